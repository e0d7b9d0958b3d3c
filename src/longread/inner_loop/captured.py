"""Long readings on a GPU: some mini-batches at a time are one replay of a CUDA graph.

The state moves into places of its own: the fast weights, and for each attention a strip of K + R tokens. Mini-batch
after mini-batch appends its keys and values to the strips, and sees the K tokens before, or the fewer that there are;
when they are full, the newest K move to the front. As a graph fixes addresses and shapes, there is one for each place
in the strip where it can begin, and for each past of a window that is not full yet, all in one pool of memory. The
lower half of the network runs over all mini-batches of a graph at once: longer products are faster.

The first ones are also computed without a graph, and a graph that scores them differently is not used.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.state import ReadingState
from longread.inner_loop.step import Carry, from_matrices, inner_step, matrices
from longread.model import Past, Transformer

MINI_BATCHES = 4
"""In one graph."""
TOLERANCE = 0.05
"""Nats by which a replayed score may differ from a plain one: the same kernels in the same order."""


class _Found(NamedTuple):
    """What a graph leaves in its places: nll [B, tokens], norms [B, mini-batches], the last output [B, D]."""

    nll: Tensor
    grad_norm: Tensor
    output: Tensor


class CapturedReader:
    """Reads B sequences, `MINI_BATCHES` at a time."""

    def __init__(self, model: Transformer, batch_size: int, inner: InnerConfig) -> None:
        config = model.config
        self._model, self.inner = weakref.ref(model), inner  # `_READERS` would keep the model alive otherwise
        self.M, self.K = config.mini_batch_size, config.window_size
        self.tokens = MINI_BATCHES * self.M
        self.room = math.ceil(self.K / self.tokens) * self.tokens
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        shape = batch_size, self.K + self.room, config.num_heads, config.head_dim
        # token by token in memory: what is appended or moved is one piece
        self._strips = [
            Past(like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2))
            for _ in range(config.num_blocks)
        ]
        self._tokens = torch.zeros(batch_size, self.tokens + 1, dtype=torch.long, device=model.device)
        self._mask = torch.ones(batch_size, self.tokens, dtype=torch.bool, device=model.device)
        self._position = torch.zeros((), dtype=torch.float64, device=model.device)
        initial = matrices(model.initial_fast_weights(batch_size))
        self._fast = [torch.empty_like(w.detach(), memory_format=torch.contiguous_format) for w in initial]
        self._captures: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, _Found]] = {}
        self._pool: Any = None
        self.weights_at = model.embedding.weight.data_ptr()
        self.usable = True

    @property
    def model(self) -> Transformer:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this reader is gone")
        return model

    def read(self, state: ReadingState, tokens: Tensor, mask: Tensor) -> tuple[ReadingState, Tensor, Tensor] | None:
        """Reads `self.tokens` · n tokens, and one that is only a target; the mask has none for the first token.

        Returns:
            the state after them, their nll, and the norms of the steps' gradients; None if the captured graph has
            turned out to compute something else.
        """
        past = self._load(state)
        nll, norms, first = [], [], 0
        for done in range(0, mask.shape[1], self.tokens):
            if first == self.room:
                self._to_the_front()
                first = 0
            self._tokens.copy_(tokens[:, done : done + self.tokens + 1])
            self._mask.copy_(mask[:, done : done + self.tokens])
            if (first, past) not in self._captures:
                self._captures[first, past] = self._capture(first, past)
            if not self.usable:
                return None
            graph, found = self._captures[first, past]
            graph.replay()
            nll.append(found.nll.clone())
            norms.append(found.grad_norm.clone())
            first, past = first + self.tokens, min(self.K, past + self.tokens)
        after = self._state(state, self._seen(first, past), mask.shape[1], found.output)
        return after, torch.cat(nll, 1), torch.cat(norms, 1)

    def _to_the_front(self) -> None:
        for strip in self._strips:
            for x in strip:
                x[:, :, : self.K].copy_(x[:, :, self.room : self.room + self.K])

    def _load(self, state: ReadingState) -> int:
        """Moves a state into its places; returns the tokens of its past."""
        P = state.lower_pasts[0].key.shape[2]
        for strip, past in zip(self._strips, (*state.lower_pasts, *state.upper_pasts), strict=True):
            for place, x in zip(strip, past, strict=True):
                place[:, :, self.K - P : self.K].copy_(x)
        for place, w in zip(self._fast, matrices(state.fast), strict=True):
            place.copy_(w)
        self._position.fill_(state.position)
        return P

    def _state(self, before: ReadingState, seen: list[Past], tokens: int, output: Tensor) -> ReadingState:
        split = self.model.num_lower_attentions
        pasts = [Past(past.key.clone(), past.value.clone()) for past in seen]
        return ReadingState(
            position=before.position + tokens,
            fast=from_matrices([w.clone() for w in self._fast]),
            lower_pasts=tuple(pasts[:split]),
            upper_pasts=tuple(pasts[split:]),
            hidden=before.hidden,
            targets=before.targets,
            targets_mask=before.targets_mask,
            output=output.clone(),
        )

    def _compute(self, first: int, past: int) -> _Found:
        """The mini-batches of one graph, from the strips and back into them; their tokens lie at first + K."""
        model, M, split = self.model, self.M, self.model.num_lower_attentions
        hidden, own = model.lower(self._tokens[:, :-1], self._seen(first, past)[:split], start=self._position)
        self._append(self._strips[:split], own, first)
        fast, steps = from_matrices(self._fast), []
        for i in range(MINI_BATCHES):
            part, place = slice(i * M, (i + 1) * M), first + i * M
            seen = self._seen(place, min(self.K, past + i * M))[split:]
            step = inner_step(
                model,
                Carry(fast, tuple(seen)),
                hidden[:, part],
                self._tokens[:, 1:][:, part],
                self._mask[:, part],
                start=self._position + i * M,
                lr=self.inner.lr,
                clip=self.inner.clip,
                order=0,
            )
            self._append(self._strips[split:], step.own, place)
            fast = step.fast
            steps.append(step)
        for place_of, w in zip(self._fast, matrices(fast), strict=True):
            place_of.copy_(w)
        self._position += self.tokens
        nll, norms = torch.cat([s.nll for s in steps], 1), torch.stack([s.grad_norm for s in steps], 1)
        return _Found(nll, norms, steps[-1].output[:, -1])

    def _seen(self, first: int, past: int) -> list[Past]:
        """The `past` tokens before those that will lie at first + K."""
        end = first + self.K
        return [Past(*(x[:, :, end - past : end] for x in strip)) for strip in self._strips]

    def _append(self, strips: Sequence[Past], own: Sequence[Past], first: int) -> None:
        for strip, made in zip(strips, own, strict=True):
            for place, x in zip(strip, made, strict=True):
                place[:, :, first + self.K : first + self.K + x.shape[2]].copy_(x)

    def _capture(self, first: int, past: int) -> tuple[torch.cuda.CUDAGraph, _Found]:
        """The graph that begins at `first` after `past` tokens; the first of all is compared with a plain run."""
        kept = [x.clone() for x in (*self._fast, self._position)]

        def put_back() -> None:
            for place, x in zip((*self._fast, self._position), kept, strict=True):
                place.copy_(x)

        plain = None
        if not self._captures:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                plain = self._compute(first, past).nll
                put_back()
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            found = self._compute(first, past)
        self._pool = self._pool or graph.pool()
        if plain is not None:
            graph.replay()
            put_back()
            worst = (found.nll - plain).abs().max().item()
            if not worst <= TOLERANCE:
                self.usable = False
                warnings.warn(f"captured mini-batches score a token {worst} nats off; reading without", stacklevel=2)
        return graph, found


_READERS: weakref.WeakKeyDictionary[Transformer, dict[tuple[int, InnerConfig], CapturedReader]] = (
    weakref.WeakKeyDictionary()
)
"""Captures take seconds and memory, so a model keeps its own until it is gone."""


def captured_reader(model: Transformer, state: ReadingState, inner: InnerConfig) -> CapturedReader | None:
    """A reader that can go on from `state`; None on a CPU, within a mini-batch, and where pasts are of odd lengths."""
    config = model.config
    if model.device.type != "cuda" or config.attention != "window" or state.hidden.shape[1]:
        return None
    lengths = {past.key.shape[2] for past in (*state.lower_pasts, *state.upper_pasts)}
    if lengths != {min(state.position, config.window_size)}:
        return None
    if state.position < config.window_size and state.position % config.mini_batch_size:
        return None
    readers = _READERS.setdefault(model, {})
    key = state.output.shape[0], inner
    reader = readers.get(key)
    if reader is None or reader.weights_at != model.embedding.weight.data_ptr():
        reader = readers[key] = CapturedReader(model, *key)
    return reader if reader.usable else None
