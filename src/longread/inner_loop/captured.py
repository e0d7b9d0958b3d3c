"""Long readings on a GPU, as replays of CUDA graphs.

Each half of the network reads by itself. The lower one, which no fast weight touches, runs over a stretch of several
mini-batches at once, on a stream of its own, one run ahead of the upper one, which takes step after step. What changes
from run to run lies in places of its own, as a graph fixes addresses: tokens, positions, fast weights, and for each
half a strip of keys and values (`_Half`). When a run is captured, and how often, says `_Half.run`.
"""

from __future__ import annotations

import collections
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

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
WORTH = 3
"""Plain runs that one capture costs: the run that it is compared with, and twice the launches."""
TOLERANCE = 0.05
"""By which a replay may differ from a plain run, the same kernels in the same order: scores in nats, hidden states as a
share of a token's norm."""
READERS = 8
"""Of a model that are kept, those used last."""

Result = TypeVar("Result")


class _Scored(NamedTuple):
    """A mini-batch that the upper half has read: nll [B, M], the norm of its gradient and, where the optimizer says it,
    whether its step was refused, [B], the last output [B, D]."""

    nll: Tensor
    grad_norm: Tensor
    refused: Tensor | None
    output: Tensor


class _Half(Generic[Result]):
    """The keys and values that one half of the network has made, and the graphs of its runs.

    Each run appends what it makes to strips of K + R tokens, and sees the K tokens before, or the fewer that there
    are. When they are full, the newest K move to the front; R is about K, so that a token is moved once at most.
    """

    def __init__(
        self, model: Transformer, batch_size: int, blocks: range, run: int, graphs: CheckedGraphs[Result]
    ) -> None:
        """`run`: tokens of the longest run."""
        config = model.config
        windows = [config.window_of(i) or 0 for i in range(config.num_blocks)]
        self.K, self._windows = max(windows), [windows[i] for i in blocks]
        self._room = run * max(1, self.K // run)
        shape = 2, len(blocks), batch_size, self.K + self._room, config.num_kv_heads, config.head_dim
        # token by token in memory: what is appended or moved is one piece
        strips = torch.empty(shape, device=model.device, dtype=model.dtype)
        self._strips, self._rows = strips.transpose(3, 4), strips.flatten(0, 2).unbind()
        self.position = torch.zeros(batch_size, dtype=torch.float64, device=model.device)
        self._first = self.past = 0
        self._graphs, self._runs = graphs, collections.Counter[tuple[int, int, int]]()

    def load(self, pasts: Sequence[Past], past: int, start: int | Tensor) -> None:
        """Takes up the pasts of a token at position `start`, which are `past` tokens, or as many as a window holds."""
        self.past = past
        self._first = past if past < self.K else 0  # while a window fills, one place for each past
        for here, given in zip(self.pasts, pasts, strict=True):
            for place, x in zip(here, given, strict=True):
                place.copy_(x)
        self.position.copy_(torch.as_tensor(start))

    @property
    def pasts(self) -> list[Past]:
        """What the next token can see: views."""
        end = self.K + self._first
        begins = (end - min(self.past, window) for window in self._windows)
        return [Past(k[:, :, begin:end], v[:, :, begin:end]) for begin, k, v in zip(begins, *self._strips, strict=True)]

    def append(self, own: Sequence[Past]) -> None:
        """Writes the keys and values of the tokens that come now."""
        for *places, made in zip(*self._strips, own, strict=True):
            for place, x in zip(places, made, strict=True):
                place.narrow(2, self.K + self._first, x.shape[2]).copy_(x)

    def run(
        self, tokens: int, runs: int, compute: Callable[[], Result], *kept: Tensor, replayed: bool = True
    ) -> Result:
        """Computes the next so many tokens: plainly, or as a graph where that pays.

        A graph is of one length, one place in the strip and one length of the past. It is captured as soon as it has
        run, or is known to be going to run, `WORTH` times. In a text of which much is still to come that is at once:
        its runs go round R / tokens places. While a window fills, each past is met once a text, so there it is the
        `WORTH`-th text. One reader has at most 2 R / tokens graphs of each length.

        Args:
            runs: of so many tokens that follow one another now, this included.
            kept: what `compute` changes in place, beside the strips, which get the same again.
            replayed: whether there may be graphs.
        """
        if self._first + tokens > self._room:
            self._to_the_front()
        key = tokens, self._first, self.past
        self._runs[key] += 1
        here = (runs - 1) // (self._room // tokens) if self.past == self.K else 0
        if replayed and self._runs[key] + here >= WORTH:
            result = self._graphs.run(key, compute, kept=lambda: put_back_later(self.position, *kept), kind=tokens)
        else:
            result = compute()
        self._first, self.past = self._first + tokens, min(self.K, self.past + tokens)
        return result

    def _to_the_front(self) -> None:
        step = self._first
        for begin in range(0, self.K, step) if self._rows else ():  # pieces that do not overlap
            end = min(begin + step, self.K)
            newest = [row[begin + step : end + step] for row in self._rows]
            torch._foreach_copy_([row[begin:end] for row in self._rows], newest)
        self._first = 0


class CapturedReader:
    """Reads B sequences, whole mini-batches of them."""

    def __init__(self, model: Transformer, batch_size: int, inner: InnerConfig, guard: bool = False) -> None:
        config, device = model.config, model.device
        self._model, self.inner = weakref.ref(model), inner  # `_READERS` would keep the model alive otherwise
        self.M = config.mini_batch_size
        self.stretch = self.M * math.ceil(STRETCH / self.M)
        warning = "captured mini-batches {}; reading goes on without"
        self._lower_graphs = CheckedGraphs[Tensor](
            device,
            compared=lambda hidden: hidden,
            scale=lambda plain: plain.norm(dim=-1, keepdim=True),
            tolerance=TOLERANCE,
            warning=warning.format("give hidden states {:.2g} of their norm off"),
        )
        self._upper_graphs = CheckedGraphs[_Scored](
            device,
            compared=lambda found: found.nll,
            scale=lambda plain: 1.0,
            tolerance=TOLERANCE,
            warning=warning.format("score a token {:.2g} nats off"),
        )
        split, blocks = model.num_lower_attentions, config.num_blocks
        self._lower = _Half(model, batch_size, range(split), self.stretch, self._lower_graphs)
        self._upper = _Half(model, batch_size, range(split, blocks), self.M, self._upper_graphs)
        self._tokens = torch.zeros(batch_size, self.stretch, dtype=torch.long, device=device)
        hidden = torch.zeros(3, batch_size, self.stretch, config.width, dtype=model.dtype, device=device)
        self._hidden, self._ahead = hidden[0, :, : self.M], hidden[1:]
        self._targets = torch.zeros(batch_size, self.M, dtype=torch.long, device=device)
        self._mask = torch.ones(batch_size, self.M, dtype=torch.bool, device=device)
        initial = matrices(model.initial_fast_weights(batch_size))
        self._fast = [torch.empty_like(w.detach(), memory_format=torch.contiguous_format) for w in initial]
        self._working = [w.to(model.dtype) for w in self._fast]
        self._max_step_norm = torch.zeros((), device=device) if guard else None
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
        return self._lower_graphs.usable and self._upper_graphs.usable

    def read(
        self, state: ReadingState, tokens: Tensor, mask: Tensor, max_step_norm: Tensor | None
    ) -> tuple[ReadingState, Tensor, Tensor, Tensor | None]:
        """Reads M · n tokens, and one that is only a target; the mask has none for the first token.

        `max_step_norm` is the limit of a step for a reader with a guard (see `longread.ops.clipped_sgd`).

        Returns:
            the state after them, their nll, the norms of the steps' gradients, and which steps were refused, where the
            optimizer says it itself.
        """
        self._load(state)
        if self._max_step_norm is not None and max_step_norm is not None:
            self._max_step_norm.copy_(max_step_norm)
        targets, nll, norms, refusals, done, total = tokens[:, 1:], [], [], [], 0, mask.shape[1]
        for stretch in self._hidden_states(tokens[:, :total]):
            for hidden in stretch.split(self.M, 1):
                part = slice(done, done + self.M)
                self._hidden.copy_(hidden)
                self._targets.copy_(targets[:, part])
                self._mask.copy_(mask[:, part])
                left = (total - done) // self.M
                kept = *self._fast, *self._working
                found = self._upper.run(self.M, left, self._run_upper, *kept, replayed=self.usable)
                nll.append(found.nll.clone())
                norms.append(found.grad_norm.clone())
                refusals += [] if found.refused is None else [found.refused.clone()]
                done += self.M
        after = self._state(state, total, found.output)
        return after, torch.cat(nll, 1), torch.stack(norms, 1), torch.stack(refusals, 1) if refusals else None

    def _hidden_states(self, tokens: Tensor) -> Iterator[Tensor]:
        """What the lower half makes of the tokens, run after run; by then the next run is under way."""
        filling = min(tokens.shape[1], self.M * math.ceil((self._lower.K - self._lower.past) / self.M))
        stretches, rest = divmod(tokens.shape[1] - filling, self.stretch)
        lengths = [self.M] * (filling // self.M) + [self.stretch] * stretches + [self.M] * (rest // self.M)
        upper, lower = torch.cuda.current_stream(), self._lower_graphs.stream
        parts, made = tokens.split(lengths, 1), []
        for i in range(len(parts) + 1):
            if i < len(parts):
                length, runs = lengths[i], lengths[i:].count(lengths[i])
                lower.wait_stream(upper)  # which has read the run before the last
                with torch.cuda.stream(lower):
                    self._tokens[:, :length].copy_(parts[i])
                    compute = functools.partial(self._run_lower, length)
                    hidden = self._lower.run(length, runs, compute, replayed=self.usable)
                    self._ahead[i % 2, :, :length].copy_(hidden)
                    made.append(lower.record_event())
            if i:
                upper.wait_event(made[i - 1])
                yield self._ahead[(i - 1) % 2, :, : lengths[i - 1]]

    def _run_lower(self, tokens: int) -> Tensor:
        half = self._lower
        hidden, own = self.model.lower(self._tokens[:, :tokens], half.pasts, start=half.position)
        half.append(own)
        half.position += tokens
        return hidden

    def _run_upper(self) -> _Scored:
        half, optimizer = self._upper, optimizer_named(self.inner.optimizer)
        working = [w.detach().requires_grad_() for w in self._working]
        step = inner_gradient(
            self.model, working, half.pasts, self._hidden, self._targets, self._mask, start=half.position, order=0
        )
        half.append(step.own)
        half.position += self.M
        update = optimizer.step_(
            self._fast,
            step.gradients,
            self._working,
            lr=self.inner.lr,
            clip=self.inner.clip,
            max_step_norm=self._max_step_norm,
        )
        return _Scored(step.nll, update.grad_norm, update.refused, step.output[:, -1])

    def _load(self, state: ReadingState) -> None:
        past = max(past.key.shape[2] for past in (*state.lower_pasts, *state.upper_pasts))
        self._lower.load(state.lower_pasts, past, state.start)
        self._upper.load(state.upper_pasts, past, state.start)
        for place, copy, w in zip(self._fast, self._working, matrices(state.fast), strict=True):
            place.copy_(w)
            copy.copy_(w)

    def _state(self, before: ReadingState, tokens: int, output: Tensor) -> ReadingState:
        lower, upper = (
            tuple(Past(*(x.clone() for x in past)) for past in half.pasts) for half in (self._lower, self._upper)
        )
        return ReadingState(
            **before.moved(tokens),
            fast=from_matrices([w.clone() for w in self._fast]),
            lower_pasts=lower,
            upper_pasts=upper,
            hidden=before.hidden,
            targets=before.targets,
            targets_mask=before.targets_mask,
            output=output.clone(),
        )


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
    reader = readers.pop(key, None)
    if reader is None or reader.weights_at != model.embedding.weight.data_ptr():
        reader = CapturedReader(model, *key)
    readers[key] = reader
    if len(readers) > READERS:
        del readers[next(iter(readers))]
    return reader if reader.usable else None
