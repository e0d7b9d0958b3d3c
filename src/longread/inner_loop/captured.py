"""Long readings on a GPU: a mini-batch is one replay of a CUDA graph.

Once the window is full, every mini-batch has the same shapes. The state then moves into places of its own: the fast
weights, and for each attention a strip of K + R tokens. Mini-batch after mini-batch appends its keys and values to the
strips, and sees the K tokens before; when they are full, the newest K move to the front. As a graph fixes addresses,
there is one for each place in the strip, R / M of them, all in one pool of memory.

The first mini-batch is also computed without a graph, and a graph that scores it differently is not used.
"""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.state import ReadingState
from longread.inner_loop.step import Carry, Step, from_matrices, inner_step, matrices
from longread.model import Past, Transformer

TOLERANCE = 0.05
"""Nats by which a replayed score may differ from a plain one: the same kernels in the same order."""


class _Capture(NamedTuple):
    graph: torch.cuda.CUDAGraph
    step: Step


class CapturedReader:
    """Reads whole mini-batches of B sequences whose windows are full."""

    def __init__(self, model: Transformer, batch_size: int, inner: InnerConfig) -> None:
        config = model.config
        self.model, self.inner = model, inner
        self.M, self.K = config.mini_batch_size, config.window_size
        self.room = math.ceil(self.K / self.M) * self.M
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        shape = batch_size, self.K + self.room, config.num_heads, config.head_dim
        # token by token in memory: what is appended or moved is one piece
        self._strips = [
            Past(like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2))
            for _ in range(config.num_blocks)
        ]
        self._tokens = torch.zeros(batch_size, self.M + 1, dtype=torch.long, device=model.device)
        self._mask = torch.ones(batch_size, self.M, dtype=torch.bool, device=model.device)
        self._position = torch.zeros((), dtype=torch.float64, device=model.device)
        self._fast = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in self._initial(batch_size)]
        self._captures: dict[int, _Capture] = {}
        self._pool: Any = None
        self.weights_at = model.embedding.weight.data_ptr()
        self.usable = True

    def _initial(self, batch_size: int) -> list[Tensor]:
        return [w.detach() for w in matrices(self.model.initial_fast_weights(batch_size))]

    def read(self, state: ReadingState, tokens: Tensor, mask: Tensor) -> tuple[ReadingState, Tensor, Tensor] | None:
        """Reads n mini-batches: tokens [B, n · M + 1], of which the last is only a target; mask [B, n · M].

        Returns:
            the state after them, nll [B, n · M], and the norm of each step's gradient [B, n]; None if the captured
            graph has turned out to compute something else.
        """
        M, count = self.M, mask.shape[1] // self.M
        self._load(state)
        nll, norms, slot = [], [], 0
        for i in range(count):
            self._tokens.copy_(tokens[:, i * M : (i + 1) * M + 1])
            self._mask.copy_(mask[:, i * M : (i + 1) * M])
            if slot not in self._captures:
                self._captures[slot] = self._capture(slot)
            if not self.usable:
                return None
            self._captures[slot].graph.replay()
            step = self._captures[slot].step
            nll.append(step.nll.clone())
            norms.append(step.grad_norm.clone())
            slot += 1
            if slot * M == self.room and i + 1 < count:
                for strip in self._strips:
                    for x in strip:
                        x[:, :, : self.K].copy_(x[:, :, self.room : self.room + self.K])
                slot = 0
        return self._state(state, slot * M, count * M, step.output), torch.cat(nll, 1), torch.stack(norms, 1)

    def _load(self, state: ReadingState) -> None:
        for strip, past in zip(self._strips, (*state.lower_pasts, *state.upper_pasts), strict=True):
            for place, x in zip(strip, past, strict=True):
                place[:, :, : self.K].copy_(x)
        for place, w in zip(self._fast, matrices(state.fast), strict=True):
            place.copy_(w)
        self._position.fill_(state.position)

    def _state(self, before: ReadingState, first: int, tokens: int, output: Tensor) -> ReadingState:
        pasts = [Past(*(x[:, :, first : first + self.K].clone() for x in strip)) for strip in self._strips]
        split = self.model.num_lower_attentions
        return ReadingState(
            position=before.position + tokens,
            fast=from_matrices([w.clone() for w in self._fast]),
            lower_pasts=tuple(pasts[:split]),
            upper_pasts=tuple(pasts[split:]),
            hidden=before.hidden,
            targets=before.targets,
            targets_mask=before.targets_mask,
            output=output[:, -1].clone(),
        )

    def _compute(self, slot: int) -> Step:
        """One mini-batch from the strips and back into them."""
        model, M, split = self.model, self.M, self.model.num_lower_attentions
        first, end = slot * M, slot * M + self.K
        seen = [Past(*(x[:, :, first:end] for x in strip)) for strip in self._strips]
        hidden, lower_own = model.lower(self._tokens[:, :M], seen[:split], start=self._position)
        step = inner_step(
            model,
            Carry(from_matrices(self._fast), tuple(seen[split:])),
            hidden,
            self._tokens[:, 1:],
            self._mask,
            start=self._position,
            lr=self.inner.lr,
            clip=self.inner.clip,
            order=0,
        )
        for strip, own in zip(self._strips, (*lower_own, *step.own), strict=True):
            for place, x in zip(strip, own, strict=True):
                place[:, :, end : end + M].copy_(x)
        for place, w in zip(self._fast, matrices(step.fast), strict=True):
            place.copy_(w)
        self._position += M
        return step

    def _capture(self, slot: int) -> _Capture:
        fast, position = [w.clone() for w in self._fast], self._position.clone()

        def put_back() -> None:
            for place, w in zip(self._fast, fast, strict=True):
                place.copy_(w)
            self._position.copy_(position)

        plain = None
        if not self._captures:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                plain = self._compute(slot).nll
                put_back()
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step = self._compute(slot)
        self._pool = self._pool or graph.pool()
        if plain is not None:
            graph.replay()
            put_back()
            worst = (step.nll - plain).abs().max().item()
            if not worst <= TOLERANCE:
                self.usable = False
                warnings.warn(f"a captured mini-batch scores a token {worst} nats off; reading without", stacklevel=2)
        return _Capture(graph, step)


_READERS: weakref.WeakKeyDictionary[Transformer, dict[tuple[int, InnerConfig], CapturedReader]] = (
    weakref.WeakKeyDictionary()
)
"""Captures take seconds and memory, so a model keeps its own until it is gone."""


def captured_reader(model: Transformer, state: ReadingState, inner: InnerConfig) -> CapturedReader | None:
    """A reader that can go on from `state`; None on a CPU, before the window is full, and within a mini-batch."""
    config = model.config
    if model.device.type != "cuda" or config.attention != "window" or state.hidden.shape[1]:
        return None
    if any(past.key.shape[2] != config.window_size for past in (*state.lower_pasts, *state.upper_pasts)):
        return None
    readers = _READERS.setdefault(model, {})
    key = state.output.shape[0], inner
    reader = readers.get(key)
    if reader is None or reader.weights_at != model.embedding.weight.data_ptr():
        reader = readers[key] = CapturedReader(model, *key)
    return reader if reader.usable else None
