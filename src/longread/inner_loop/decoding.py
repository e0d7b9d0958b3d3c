"""One token after the other: the state lies in places that a token changes in place.

Between two inner steps a token costs one pass through the network, for which `read` would copy every window. The inner
step itself stays `read`'s: when a mini-batch is complete, the state leaves its places, the next token is read, and the
state comes back.

A model has one set of places for each batch size, so decoders of several texts take turns in it. Taking turns copies
windows; it changes no result. A model with other mixers than attention is read by `read` alone.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.places import Places
from longread.inner_loop.reading import next_token_logits, read
from longread.inner_loop.state import ReadingState
from longread.model import Transformer


class Decoder:
    """B sequences that go on from `state`, a token at a time.

    Args:
        state: of at least one token.
        learn: False reads with the weights as they are, as in `longread.inner_loop.read`.
    """

    def __init__(self, model: Transformer, state: ReadingState, inner: InnerConfig, *, learn: bool = True) -> None:
        self.model, self.inner, self.learn = model, inner, learn and model.config.num_suffix_blocks > 0
        if not self.learn and state.hidden.shape[1]:  # what waits is never learned from
            state = dataclasses.replace(
                state, hidden=state.hidden[:, :0], targets=state.targets[:, :0], targets_mask=state.targets_mask[:, :0]
            )
        self.position = state.position
        """Tokens read."""
        self.steps = 0
        """Inner steps that it came to."""
        self.rolled_back = torch.zeros((), dtype=torch.long, device=state.output.device)
        """Those of them, of all sequences together, that were refused."""
        self._state: ReadingState | None = state  # None while it is in the places
        self._batch_size = len(state.output)
        self._has_places = model.config.mixer == "attention"

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, [B, V], float32 or wider; overwritten when it is read."""
        if not self._has_places:
            return next_token_logits(self.model, self.state())
        return self._places().logits(self._batch_size)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Reads one more token of each sequence, int64 [B]."""
        self.position += 1
        if not self._has_places:
            self._state = self._step(self.state(), tokens)
            return
        places = self._places()
        if places.due(0):
            places.put(0, self._step(places.take(0, self._batch_size), tokens), learn=self.learn)
        else:
            places.read(tokens)

    def _step(self, state: ReadingState, tokens: Tensor) -> ReadingState:
        found = read(self.model, state, tokens.unsqueeze(1), inner=self.inner, learn=self.learn, guard=True)
        self.steps += found.rolled_back.shape[1]
        self.rolled_back = self.rolled_back + found.rolled_back.sum()
        return found.state

    @torch.no_grad()
    def state(self) -> ReadingState:
        """What `longread.inner_loop.read` goes on with; a value, copied out of the places."""
        return self._places().take(0, self._batch_size) if self._state is None else self._state

    def _places(self) -> Places:
        """The places, with this text in them."""
        of_model = _PLACES.setdefault(self.model, {})
        key, identity = (self._batch_size, self.learn), _identity(self.model)
        shared = of_model.get(key)
        if shared is not None and (shared.built_for != identity or shared.occupant() is not self):
            occupant = shared.occupant()
            if occupant is not None:
                occupant._state = shared.places.take(0, self._batch_size)
            shared.occupant = weakref.ref(self)
        if shared is None or shared.built_for != identity:
            places = Places(self.model, self._batch_size, learn=self.learn)
            shared = of_model[key] = _Shared(places, identity, weakref.ref(self))
        if self._state is not None:
            shared.places.put(0, self._state, learn=self.learn)
            self._state = None
        return shared.places


@dataclass
class _Shared:
    """Places in which decoders take turns."""

    places: Places
    built_for: tuple[int, torch.dtype]
    occupant: weakref.ref[Decoder]


_PLACES: weakref.WeakKeyDictionary[Transformer, dict[tuple[int, bool], _Shared]] = weakref.WeakKeyDictionary()


def _identity(model: Transformer) -> tuple[int, torch.dtype]:
    """Changes when the model moves or is cast."""
    return model.embedding.weight.data_ptr(), model.dtype
