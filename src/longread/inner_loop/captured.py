"""Long readings on a GPU, as replays of CUDA graphs.

The state moves into places of its own: the fast weights, and for each attention a strip of K + R tokens. Mini-batch
after mini-batch appends its keys and values to the strips, and sees the K tokens before, or the fewer that there are;
when they are full, the newest K move to the front. As a graph fixes addresses and shapes, there is one for each place
in the strip where it can begin, and for each past of a window that is not full yet, all in one pool of memory.

A long graph holds several stretches of mini-batches, what is left over is read one mini-batch a graph. The lower half
of the network runs over a whole stretch at once, on a stream of its own: while the upper half is busy with the
mini-batches of one stretch, it is already at the next, and fills what small products leave of the processors.

The first graph of each length is checked (`graphs.py`) by its scores.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.graphs import CheckedGraphs, can_capture, put_back_later
from longread.inner_loop.optimizers import optimizer_named
from longread.inner_loop.state import ReadingState
from longread.inner_loop.step import from_matrices, inner_gradient, matrices
from longread.model import Past, Transformer

STRETCH = 2048
"""Tokens for which the lower half runs at once, or one mini-batch if that is longer."""
STRETCHES = 4
"""In a long graph."""
TOLERANCE = 0.05
"""Nats by which a replayed score may differ from a plain one: the same kernels in the same order."""


class _Found(NamedTuple):
    """The outputs of a graph, in its places: nll [B, tokens], norms and, where the optimizer says it, refusals
    [B, mini-batches], the last output [B, D]."""

    nll: Tensor
    grad_norm: Tensor
    refused: Tensor | None
    output: Tensor


class _Place(NamedTuple):
    """Where a graph begins."""

    tokens: int
    """That it reads."""
    first: int
    """In the strips; the tokens lie at first + K."""
    past: int
    """Tokens that the first of them can see, at most K."""


class CapturedReader:
    """Reads B sequences, one mini-batch or several stretches of them at a time."""

    def __init__(self, model: Transformer, batch_size: int, inner: InnerConfig, guard: bool = False) -> None:
        config = model.config
        self._model, self.inner = weakref.ref(model), inner  # `_READERS` would keep the model alive otherwise
        self.M = config.mini_batch_size
        self._windows = [config.window_of(i) or 0 for i in range(config.num_blocks)]
        self.K = max(self._windows)
        self.stretch = self.M * math.ceil(STRETCH / self.M)
        self.long = STRETCHES * self.stretch
        self.room = max(self.long, self.M * math.ceil(self.K / self.M))
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        shape = batch_size, self.K + self.room, config.num_kv_heads, config.head_dim
        # token by token in memory: what is appended or moved is one piece
        self._strips = [
            Past(like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2))
            for _ in range(config.num_blocks)
        ]
        self._tokens = torch.zeros(batch_size, self.long + 1, dtype=torch.long, device=model.device)
        self._mask = torch.ones(batch_size, self.long, dtype=torch.bool, device=model.device)
        self._position = torch.zeros(batch_size, dtype=torch.float64, device=model.device)
        initial = matrices(model.initial_fast_weights(batch_size))
        self._fast = [torch.empty_like(w.detach(), memory_format=torch.contiguous_format) for w in initial]
        self._working = [w.to(model.dtype) for w in self._fast]
        self._max_step_norm = torch.zeros((), device=model.device) if guard else None
        self._graphs = CheckedGraphs[_Found](
            model.device,
            compared=lambda found: found.nll,
            scale=lambda plain: 1.0,
            tolerance=TOLERANCE,
            warning="captured mini-batches score a token {:.2g} nats off; reading goes on without",
        )
        self.weights_at = model.embedding.weight.data_ptr()

    @property
    def model(self) -> Transformer:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this reader is gone")
        return model

    @property
    def usable(self) -> bool:
        """False once a graph has turned out to compute something else; a reading goes on here without, to its end."""
        return self._graphs.usable

    def read(
        self, state: ReadingState, tokens: Tensor, mask: Tensor, max_step_norm: Tensor | None
    ) -> tuple[ReadingState, Tensor, Tensor, Tensor | None]:
        """Reads M · n tokens, and one that is only a target; the mask has none for the first token.

        `max_step_norm` is the limit of a step for a reader with a guard (see `longread.ops.clipped_sgd`).

        Returns:
            the state after them, their nll, the norms of the steps' gradients, and which steps were refused, where the
            optimizer says it itself.
        """
        past = self._load(state)
        if self._max_step_norm is not None and max_step_norm is not None:
            self._max_step_norm.copy_(max_step_norm)
        nll, norms, refusals, first, done, total = [], [], [], 0, 0, mask.shape[1]
        while done < total:
            count = self.long if total - done >= self.long else self.M
            if first + count > self.room:
                self._to_the_front(first)
                first = 0
            self._tokens[:, : count + 1].copy_(tokens[:, done : done + count + 1])
            self._mask[:, :count].copy_(mask[:, done : done + count])
            place = _Place(count, first, past)
            found = self._graphs.run(place, functools.partial(self._compute, place), kept=self._kept, kind=count)
            nll.append(found.nll.clone())
            norms.append(found.grad_norm.clone())
            refusals += [] if found.refused is None else [found.refused.clone()]
            done, first, past = done + count, first + count, min(self.K, past + count)
        after = self._state(state, self._seen(first, past), total, found.output)
        return after, torch.cat(nll, 1), torch.cat(norms, 1), torch.cat(refusals, 1) if refusals else None

    def _to_the_front(self, first: int) -> None:
        for strip in self._strips:
            for x in strip:
                newest = x[:, :, first : first + self.K]
                x[:, :, : self.K].copy_(newest if first >= self.K else newest.clone())

    def _load(self, state: ReadingState) -> int:
        """Moves a state into its places; returns the tokens of its past."""
        pasts = (*state.lower_pasts, *state.upper_pasts)
        for strip, past in zip(self._strips, pasts, strict=True):
            for place, x in zip(strip, past, strict=True):
                place[:, :, self.K - x.shape[2] : self.K].copy_(x)
        for place, w in zip(self._fast, matrices(state.fast), strict=True):
            place.copy_(w)
        for copy, w in zip(self._working, self._fast, strict=True):
            copy.copy_(w)
        self._position.copy_(torch.as_tensor(state.start))
        return max(past.key.shape[2] for past in pasts)

    def _state(self, before: ReadingState, seen: list[Past], tokens: int, output: Tensor) -> ReadingState:
        split = self.model.num_lower_attentions
        pasts = [Past(past.key.clone(), past.value.clone()) for past in seen]
        return ReadingState(
            **before.moved(tokens),
            fast=from_matrices([w.clone() for w in self._fast]),
            lower_pasts=tuple(pasts[:split]),
            upper_pasts=tuple(pasts[split:]),
            hidden=before.hidden,
            targets=before.targets,
            targets_mask=before.targets_mask,
            output=output.clone(),
        )

    def _kept(self) -> Callable[[], None]:
        """The undoing of the mini-batches of a graph; the strips get the same again."""
        return put_back_later(*self._fast, *self._working, self._position)

    def _compute(self, place: _Place) -> _Found:
        """The mini-batches of one graph, from the strips and back into them."""
        split, upper, lower = self.model.num_lower_attentions, torch.cuda.current_stream(), torch.cuda.Stream()
        lower.wait_stream(upper)
        # kept to the end: memory that is free again would be used again by the other stream
        hidden, found, updates = [], [], []
        optimizer = optimizer_named(self.inner.optimizer)
        for begin in range(0, place.tokens, self.stretch):
            end = min(begin + self.stretch, place.tokens)
            with torch.cuda.stream(lower):
                made, own = self.model.lower(
                    self._tokens[:, begin:end], self._before(place, begin)[:split], start=self._position + begin
                )
                self._append(self._strips[:split], own, place.first + begin)
            hidden.append((made, lower.record_event()))
        for begin in range(0, place.tokens, self.M):
            made, ready = hidden[begin // self.stretch]
            upper.wait_event(ready)
            offset, part = begin % self.stretch, slice(begin, begin + self.M)
            step = inner_gradient(
                self.model,
                [w.detach().requires_grad_() for w in self._working],
                self._before(place, begin)[split:],
                made[:, offset : offset + self.M],
                self._tokens[:, 1:][:, part],
                self._mask[:, part],
                start=self._position + begin,
                order=0,
            )
            self._append(self._strips[split:], step.own, place.first + begin)
            updates.append(
                optimizer.step_(
                    self._fast,
                    step.gradients,
                    self._working,
                    lr=self.inner.lr,
                    clip=self.inner.clip,
                    max_step_norm=self._max_step_norm,
                )
            )
            found.append(step)
        self._position += place.tokens
        refusals = [update.refused for update in updates if update.refused is not None]
        return _Found(
            torch.cat([f.nll for f in found], 1),
            torch.stack([update.grad_norm for update in updates], 1),
            torch.stack(refusals, 1) if refusals else None,
            found[-1].output[:, -1],
        )

    def _before(self, place: _Place, tokens: int) -> list[Past]:
        """The keys that the token can see that comes so many after the first of a graph can see."""
        return self._seen(place.first + tokens, min(self.K, place.past + tokens))

    def _seen(self, first: int, past: int) -> list[Past]:
        """The `past` tokens before those that will lie at first + K, or the fewer that a window holds."""
        end = first + self.K
        begins = (end - min(past, window) for window in self._windows)
        return [Past(*(x[:, :, begin:end] for x in strip)) for begin, strip in zip(begins, self._strips, strict=True)]

    def _append(self, strips: Sequence[Past], own: Sequence[Past], first: int) -> None:
        for strip, made in zip(strips, own, strict=True):
            for place, x in zip(strip, made, strict=True):
                place[:, :, first + self.K : first + self.K + x.shape[2]].copy_(x)


_READERS: weakref.WeakKeyDictionary[Transformer, dict[tuple[int, InnerConfig, bool], CapturedReader]] = (
    weakref.WeakKeyDictionary()
)
"""Captures take seconds and memory, so a model keeps its own until it is gone."""


def captured_reader(
    model: Transformer, state: ReadingState, inner: InnerConfig, *, guard: bool
) -> CapturedReader | None:
    """A reader that can go on from `state`; None on a CPU, within a mini-batch, and where pasts are of odd lengths."""
    config = model.config
    if not can_capture(model.device) or state.hidden.shape[1]:
        return None
    if (config.mixer, config.attention) != ("attention", "window"):
        return None
    lengths = [past.key.shape[2] for past in (*state.lower_pasts, *state.upper_pasts)]
    widest, longest = max(config.window_of(i) or 0 for i in range(config.num_blocks)), max(lengths)
    if any(length != min(longest, config.window_of(i) or 0) for i, length in enumerate(lengths)):
        return None
    if longest < widest and (longest != state.position or longest % config.mini_batch_size):
        return None
    readers = _READERS.setdefault(model, {})
    key = state.output.shape[0], inner, guard
    reader = readers.get(key)
    if reader is None or reader.weights_at != model.embedding.weight.data_ptr():
        reader = readers[key] = CapturedReader(model, *key)
    return reader if reader.usable else None
