"""A model that scores many tokens of one text in one pass, and can take back those that are not to stay.

Keys and values lie in places with room at their end: a pass appends to them, taking back is forgetting the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longread.config import UserError
from longread.inner_loop import ReadingState
from longread.model import Past, Transformer

SPARE = 1024
"""Tokens for which there is room at first, or an eighth of what there is; then room is made anew."""


class Verifier:
    """One text that goes on from `state`, read with the weights as they are.

    Raises:
        UserError: the model has recurrent mixers or keeps tokens, whose states cannot be taken back.
    """

    def __init__(self, model: Transformer, state: ReadingState) -> None:
        if model.config.mixer != "attention":
            raise UserError(
                f"mixer {model.config.mixer} cannot take tokens back; verify with a model of attention alone"
            )
        model.config.check_nothing_kept("a verifier")
        self.model, self.position = model, state.position
        self._fast = state.fast
        windows = [model.config.window_of(i) for i in range(model.config.num_blocks)]
        pasts = (*state.lower_pasts, *state.upper_pasts)
        self._pasts = [_Growing(past, window) for past, window in zip(pasts, windows, strict=True)]
        self._before = self._outputs = state.output.unsqueeze(1)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, [V]."""
        return self.model.logits(self._outputs[0, -1])

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Reads n >= 1 tokens, int64 [n], and gives the logits of what follows each, [n, V]."""
        model, split = self.model, self.model.num_lower_attentions
        pasts = [past.view() for past in self._pasts]
        hidden, lower = model.lower(tokens.unsqueeze(0), pasts[:split], start=self.position)
        outputs, upper = model.upper(hidden, self._fast, pasts[split:], start=self.position, order=0)
        for past, own in zip(self._pasts, (*lower, *upper), strict=True):
            past.append(own)
        self._before, self._outputs = self._outputs[:, -1:], outputs
        self.position += len(tokens)
        return model.logits(outputs[0])

    def take_back(self, count: int) -> None:
        """Forgets the newest `count` tokens, which the newest pass must have read."""
        if not count:
            return
        kept = self._outputs.shape[1] - count
        self._outputs = self._outputs[:, :kept] if kept else self._before
        self.position -= count
        for past in self._pasts:
            past.length -= count


class _Growing:
    """Keys and values of one attention, [1, N, room, H], of which the first `length` count."""

    def __init__(self, past: Past, window: int | None) -> None:
        self.window, self.length = window, past.key.shape[2]
        self._held: Sequence[Tensor] = past
        self._make_room(0)

    def view(self) -> Past:
        """The tokens that the next one can see."""
        first = 0 if self.window is None else max(0, self.length - self.window)
        return Past(*(x[:, :, first : self.length] for x in self._held))

    def append(self, own: Past) -> None:
        """Takes up the newest tokens."""
        count = own.key.shape[2]
        if self.length + count > self._held[0].shape[2]:
            self._make_room(count)
        for place, x in zip(self._held, own, strict=True):
            place[:, :, self.length : self.length + count] = x
        self.length += count

    def _make_room(self, count: int) -> None:
        """A window moves to the front; what may be taken back of it is at most what a pass appends."""
        past = self.view()
        self.length = past.key.shape[2]
        room = self.length + count + max(SPARE, self.length // 8)
        held = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in past]
        for place, x in zip(held, past, strict=True):
            place[:, :, : self.length] = x
        self._held = held
