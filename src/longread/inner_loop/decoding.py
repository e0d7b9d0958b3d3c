"""One token after the other: the state lies in places that a token changes in place.

Between two inner steps a token costs one pass through the network. `read` would copy every window for it. Here new keys
and values go into rings, the fast weights are cast to the type of the products once, and on a GPU the pass is one
replay of a CUDA graph. The inner step itself stays `read`'s: when a mini-batch is complete, the state moves out, the
next token is read, and the state moves in again.

A model has one set of places for each batch size, so decoders of several texts take turns in it. Taking turns copies
windows; it changes no result. A model with other mixers than attention is read by `read` alone.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.reading import next_token_logits, read
from longread.inner_loop.state import ReadingState
from longread.inner_loop.step import from_matrices, matrices
from longread.model import Ring, Transformer

SPARE = 1024
"""Tokens for which attention without a window gets room, or an eighth of what it holds; then room is made anew."""
TOLERANCE = 0.05
"""Difference of logits, as a share of their spread, at which a captured pass is not used."""


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
        self._state: ReadingState | None = state  # None while it is in the places
        self._batch_size = len(state.output)
        self._has_places = model.config.mixer == "attention"

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, [B, V], float32 or wider; overwritten when it is read."""
        if not self._has_places:
            return next_token_logits(self.model, self.state())
        return self._places().logits

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Reads one more token of each sequence, int64 [B]."""
        self.position += 1
        if not self._has_places:
            found = read(self.model, self.state(), tokens.unsqueeze(1), inner=self.inner, learn=self.learn)
            self._state = found.state
            return
        places = self._places()
        if self.learn and places.waiting == self.model.config.mini_batch_size:
            places.put(read(self.model, places.take(), tokens.unsqueeze(1), inner=self.inner).state)
        else:
            if places.full:
                places.put(places.take())
            places.read(tokens)

    @torch.no_grad()
    def state(self) -> ReadingState:
        """What `longread.inner_loop.read` goes on with; a value, copied out of the places."""
        return self._places().take() if self._state is None else self._state

    def _places(self) -> _Places:
        """The places, with this text in them."""
        of_model = _PLACES.setdefault(self.model, {})
        places = of_model.get((self._batch_size, self.learn))
        stale = places is None or places.built_for != _identity(self.model)
        occupant = None if places is None else places.occupant()
        if places is not None and occupant is not None and (stale or occupant is not self):
            occupant._state = places.take()
        if places is None or stale:
            places = of_model[self._batch_size, self.learn] = _Places(self.model, self._batch_size, self.learn)
        if self._state is not None:
            places.put(self._state)
            self._state, places.occupant = None, weakref.ref(self)
        return places


class _Places:
    """Where one batch is decoded; everything that a CUDA graph reads or writes has a fixed address."""

    def __init__(self, model: Transformer, batch_size: int, learn: bool) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        self._model, self._learn = weakref.ref(model), learn  # `_PLACES` would keep the model alive otherwise
        self.built_for = _identity(model)
        self.occupant: Callable[[], Decoder | None] = lambda: None
        self._extra = config.mini_batch_size if learn else 0  # how much more than a window the inner step looks back
        self._captures = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rings: list[Ring] = []
        self._working: list[Tensor] = []
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._hidden = torch.zeros(batch_size, self._extra, config.width, device=device, dtype=dtype)
        self._output = torch.zeros(batch_size, config.width, device=device, dtype=dtype)
        self.logits = torch.empty(0)

    @property
    def model(self) -> Transformer:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these places is gone")
        return model

    @property
    def position(self) -> int:
        """Tokens read."""
        return self._start.position + len(self._read)

    @property
    def waiting(self) -> int:
        """Tokens of the unfinished mini-batch."""
        return self._start.hidden.shape[1] + len(self._read) if self._learn else 0

    @property
    def full(self) -> bool:
        """Whether an attention without a window has no room for another token."""
        return self._too_small(self.position)

    def _windows(self) -> list[tuple[int | None, int]]:
        """Of each attention: its window, and what must be kept beyond it."""
        config, split = self.model.config, self.model.num_lower_attentions
        return [(config.window_of(i), 0 if i < split else self._extra) for i in range(config.num_blocks)]

    def _too_small(self, position: int) -> bool:
        return any(
            window is None and ring.key.shape[2] <= position
            for ring, (window, _) in zip(self._rings, self._windows(), strict=True)
        )

    def put(self, state: ReadingState) -> None:
        """Goes on from `state`."""
        if not self._rings or self._too_small(state.position):
            self._make_room(state.position)
        for ring, past in zip(self._rings, (*state.lower_pasts, *state.upper_pasts), strict=True):
            ring.put(past.last(ring.key.shape[2]), state.position)
        weights = matrices(state.fast)
        if not self._captures:
            self._working = [w.to(self.model.dtype) for w in weights]
        elif not self._working:
            self._working = [w.to(self.model.dtype, copy=True).contiguous() for w in weights]
        else:
            torch._foreach_copy_(self._working, weights)
        m = state.hidden.shape[1]
        self._hidden[:, :m].copy_(state.hidden)
        self._slot.fill_(m)
        self._position.fill_(state.position)
        self._output.copy_(state.output)
        self.logits = self.model.logits(state.output)
        self._start = dataclasses.replace(state, lower_pasts=(), upper_pasts=())  # windows are large
        self._read: list[Tensor] = []

    def take(self) -> ReadingState:
        """The state as a value."""
        start, position, m, split = self._start, self.position, self.waiting, self.model.num_lower_attentions
        pasts = []
        for ring, (window, extra) in zip(self._rings, self._windows(), strict=True):
            kept = position if window is None else min(position, window + min(m, extra))
            pasts.append(ring.take(kept, position))
        new = torch.cat(self._read, 1) if self._read else start.targets[:, :0]
        known = new[:, 0 if start.hidden.shape[1] else 1 :] if self._learn else new[:, :0]
        return ReadingState(
            position=position,
            fast=start.fast,
            lower_pasts=tuple(pasts[:split]),
            upper_pasts=tuple(pasts[split:]),
            hidden=self._hidden[:, :m].clone(),
            targets=torch.cat((start.targets, known), 1),
            targets_mask=torch.cat((start.targets_mask, torch.ones_like(known, dtype=torch.bool)), 1),
            output=self._output.clone(),
        )

    def read(self, tokens: Tensor) -> None:
        """Reads one token of each sequence; there must be room, and no inner step due."""
        self._tokens.copy_(tokens.unsqueeze(1))
        if self._graph is None and self._captures:
            self._capture()
        elif self._graph is None:
            self.logits = self._pass()
        else:
            self._graph.replay()
            self.logits = self._captured
        self._read.append(self._tokens.clone())

    def _pass(self) -> Tensor:
        model, start, split = self.model, self._position[0], self.model.num_lower_attentions
        hidden, _ = model.lower(self._tokens, self._rings[:split], start=start)
        if self._learn:
            self._hidden.index_copy_(1, self._slot, hidden)
        output, _ = model.upper(hidden, from_matrices(self._working), self._rings[split:], start=start, order=0)
        self._output.copy_(output[:, -1])
        self._position += 1
        self._slot += 1
        return model.logits(self._output)

    def _capture(self) -> None:
        """Reads the token in place with and without a graph, and compares."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.logits = self._pass()
            self._position -= 1
            self._slot -= 1
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._captured = self._pass()
        graph.replay()
        worst = ((self._captured - self.logits).abs().max() / self.logits.std()).item()
        if worst <= TOLERANCE:
            self._graph, self.logits = graph, self._captured
        else:
            self._captures = False
            warnings.warn(f"a captured pass gives logits {worst:.2g} off; decoding goes on without", stacklevel=2)

    def _make_room(self, position: int) -> None:
        config, like = self.model.config, self._output
        self._rings, self._graph = [], None
        for window, extra in self._windows():
            slots = position + max(SPARE, position // 8) if window is None else window + extra
            shape = like.shape[0], config.num_heads, slots, config.head_dim
            self._rings.append(Ring(like.new_zeros(shape), like.new_zeros(shape), self._position))


_PLACES: weakref.WeakKeyDictionary[Transformer, dict[tuple[int, bool], _Places]] = weakref.WeakKeyDictionary()


def _identity(model: Transformer) -> tuple[int, torch.dtype]:
    """Changes when the model moves or is cast."""
    return model.embedding.weight.data_ptr(), model.dtype
