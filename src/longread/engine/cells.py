"""Lanes that share nothing: what a sequence gives in one is bit for bit what it gives alone.

Products over several rows sum in another order than those over one, and attention over more slots than needed does too.
So each lane has places of its own, of which it fills the only one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longread.inner_loop import ReadingState
from longread.inner_loop.places import Places
from longread.model import Transformer


class Cells:
    """What `longread.inner_loop.places.Places` is, a pass for each lane."""

    def __init__(self, model: Transformer, lanes: int) -> None:
        self._model = model
        self._cells: list[Places] = []
        self._learning: list[bool] = []
        self.grow(lanes)

    @property
    def lanes(self) -> int:
        """How many there are, empty ones included."""
        return len(self._cells)

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        return sum(cell.nbytes for cell in self._cells)

    def grow(self, lanes: int) -> None:
        """Adds empty lanes, up to so many."""
        more = lanes - self.lanes
        self._cells += [Places(self._model, 1, learn=True) for _ in range(more)]
        self._learning += [True] * more

    def put(self, lane: int, state: ReadingState, *, learn: bool) -> None:
        """Lets the sequence of `state`, which has read something, go on in a lane."""
        if learn != self._learning[lane]:  # one that does not learn looks back less far
            self._cells[lane], self._learning[lane] = Places(self._model, 1, learn=learn), learn
        self._cells[lane].put(0, state, learn=learn)

    def take(self, lane: int, device: torch.device | None = None) -> ReadingState:
        """The state, as a value, of the sequence in a lane, on another device if one is given."""
        return self._cells[lane].take(0, device=device)

    def leave(self, lane: int) -> None:
        """Makes a lane empty."""
        self._cells[lane].leave(0)

    def move(self, origin: int, lane: int) -> None:
        """Moves a sequence into an empty lane."""
        cells, learning = self._cells, self._learning
        cells[origin], cells[lane] = cells[lane], cells[origin]
        learning[origin], learning[lane] = learning[lane], learning[origin]

    def due(self, lane: int) -> bool:
        """Whether the sequence must leave before its next token is read."""
        return self._cells[lane].due(0)

    def logits(self, count: int) -> Tensor:
        """Of the next token of the first `count` lanes, [count, V]."""
        return torch.cat([cell.logits(1) for cell in self._cells[:count]])

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The likeliest next token of each of the first `count` lanes, and its log-probability."""
        return [found for cell in self._cells[:count] for found in cell.likeliest(1)]

    def read_one(self, lane: int, token: int) -> None:
        """Reads one token in a lane; it may not be due."""
        self._cells[lane].read(torch.tensor([token], device=self._model.device))
