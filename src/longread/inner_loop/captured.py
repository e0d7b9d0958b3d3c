"""Long readings on a GPU, as replays of CUDA graphs.

Each half of the network reads by itself. The lower one, which no fast weight touches, runs over a stretch of several
mini-batches at once, on a stream of its own, one run ahead of the upper one, which takes step after step. What changes
from run to run lies in places of its own, as a graph fixes addresses: tokens, positions, fast weights, and for each
half the keys and values (`Strips`, which says when a run is captured).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.graphs import CheckedGraphs, put_back_later
from longread.inner_loop.optimizers import Update, optimizer_named
from longread.inner_loop.state import ReadingState
from longread.inner_loop.step import Carry, from_matrices, inner_gradient, matrices
from longread.model import Past, Transformer, free_bytes

STRETCH = 2048
"""Tokens for which the lower half runs at once, or one mini-batch if that is longer."""
TOLERANCE = 0.05
"""By which a replay may differ from a plain run, the same kernels in the same order: scores in nats, hidden states as a
share of a token's norm."""
READERS = 8
"""Of a model that are kept, those used last."""
SHARE = 8
"""A reader of several sequences takes one part in so many of the free memory at most: with large strips they keep a GPU
busy without graphs."""
WORTH = 3
"""Plain runs that one capture costs: the run that it is compared with, and twice the launches."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Strips(Generic[Result]):
    """A strip for the keys, and one for the values, of each attention in one half of the network.

    Each run of the half appends what it makes to strips of K + R tokens, and sees the K tokens before, or the fewer
    that there are. When they are full, the newest K move to the front; R is about K, so a token is moved once at most.
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
        self._first = self._read = 0
        self._graphs, self._runs = graphs, collections.Counter[tuple[int, int, int]]()

    def load(self, pasts: Sequence[Past], position: int, start: int | Tensor) -> None:
        """Takes up the pasts of a token at `position`; `start` says it of each sequence."""
        self._read = min(position, self.K)
        self._first = position if self.missing and position <= self._room else 0  # one place for each short past
        for here, given in zip(self.pasts(), pasts, strict=True):
            for place, x in zip(here, given, strict=True):
                place.copy_(x)
        self.position.copy_(torch.as_tensor(start))

    @property
    def missing(self) -> int:
        """Tokens that the next one sees less than a whole window."""
        return max(0, self.K - self._read)

    def pasts(self, extra: int = 0) -> list[Past]:
        """What the next token can see, and `extra` tokens more: views."""
        end = self.K + self._first
        begins = (end - min(self._read, window + extra) for window in self._windows)
        return [Past(k[:, :, begin:end], v[:, :, begin:end]) for begin, k, v in zip(begins, *self._strips, strict=True)]

    def append(self, own: Sequence[Past]) -> None:
        """Writes the keys and values of the tokens that come now."""
        for rows, made in zip(self._strips, zip(*own, strict=True), strict=True) if own else ():
            places = [row.narrow(2, self.K + self._first, x.shape[2]) for row, x in zip(rows, made, strict=True)]
            torch._foreach_copy_(places, made)

    def run(
        self, tokens: int, runs: int, compute: Callable[[], Result], *kept: Tensor, replayed: bool = True
    ) -> Result:
        """Computes the next so many tokens: plainly, or as a graph where that pays.

        A graph is of one length, one place in the strip and one length of the past. It is captured as soon as it has
        run, or is known to be going to run, `WORTH` times. In a text of which much is still to come that is at once:
        its runs go round R / tokens places. While a window fills, each past is met once a text, so there it is the
        `WORTH`-th text. One reader has at most 2 R / M graphs of each length.

        Args:
            runs: of so many tokens that follow one another now, this included.
            kept: what `compute` changes in place, beside the strips, which get the same again.
            replayed: whether there may be graphs.
        """
        if self._first + tokens > self._room:
            self._to_the_front()
        key = tokens, self._first, self.missing
        self._runs[key] += 1
        here = 0 if self.missing else (runs - 1) // (self._room // tokens)
        if replayed and self._runs[key] + here >= WORTH:
            result = self._graphs.run(key, compute, kept=lambda: put_back_later(self.position, *kept), kind=tokens)
        else:
            result = compute()
        self._first, self._read = self._first + tokens, self._read + tokens
        return result

    def _to_the_front(self) -> None:
        step = self._first
        for begin in range(0, self.K, step) if self._rows else ():  # pieces that do not overlap
            end = min(begin + step, self.K)
            newest = [row[begin + step : end + step] for row in self._rows]
            torch._foreach_copy_([row[begin:end] for row in self._rows], newest)
        self._first = 0


class _Scored(NamedTuple):
    """A mini-batch that the upper half has read: nll [B, M], the norm of its gradient and, where the optimizer says it,
    whether its step was refused, [B], the last output [B, D]."""

    nll: Tensor
    grad_norm: Tensor
    refused: Tensor | None
    output: Tensor


def _alone(
    method: Callable[Concatenate[CapturedReader, Arguments], Result],
) -> Callable[Concatenate[CapturedReader, Arguments], Result]:
    """For one thread at a time, from what it loads to what it copies out."""

    @functools.wraps(method)
    def alone(reader: CapturedReader, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with reader.lock, no_inference_mode():
            return method(reader, *args, **kwargs)

    return alone


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
        above = range(model.num_lower_attentions, config.num_blocks)
        self._batch_size, self._upper = batch_size, Strips(model, batch_size, above, self.M, self._upper_graphs)
        self._tokens = torch.zeros(batch_size, self.stretch, dtype=torch.long, device=device)
        width = config.width
        self._ahead = torch.zeros(2, batch_size, self.stretch, width, dtype=model.dtype, device=device)
        self._hidden = torch.zeros(batch_size, self.M, width, dtype=model.dtype, device=device)
        self._targets = torch.zeros(batch_size, self.M, dtype=torch.long, device=device)
        self._mask = torch.ones(batch_size, self.M, dtype=torch.bool, device=device)
        initial = matrices(model.initial_fast_weights(batch_size))
        self._fast = [torch.empty_like(w.detach(), memory_format=torch.contiguous_format) for w in initial]
        self._working = [w.to(model.dtype) for w in self._fast]
        self._max_step_norm = torch.zeros((), device=device) if guard else None
        self.place = place_of(model)
        self.lock = threading.Lock()

    @property
    def model(self) -> Transformer:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this reader is gone")
        return model

    @functools.cached_property
    def _lower(self) -> Strips[Tensor]:
        """Most of the memory; what only takes steps does without."""
        model = self.model
        return Strips(model, self._batch_size, range(model.num_lower_attentions), self.stretch, self._lower_graphs)

    @property
    def usable(self) -> bool:
        """False once a graph has turned out to compute something else; a reading goes on here without, to its end."""
        return self._lower_graphs.usable and self._upper_graphs.usable

    @_alone
    def read(
        self, state: ReadingState, tokens: Tensor, mask: Tensor, max_step_norm: Tensor | None
    ) -> tuple[ReadingState, list[Tensor], list[Tensor], list[Tensor]]:
        """Reads as many mini-batches as the tokens [B, n] fill, n >= M; first takes the step on one that is waiting.

        The last of them is waiting after it if no token follows: the graph that scores it takes a step, which is
        dropped. `max_step_norm` is the limit of a step for a reader with a guard (see `longread.ops.clipped_sgd`).

        Returns:
            the state after them, the nll of the tokens that follow each of theirs, the norms of the steps' gradients,
            and which steps were refused, where the optimizer says it itself.
        """
        M, n, waiting = self.M, tokens.shape[1], state.hidden.shape[1]
        read, steps = n // M * M, (waiting + n - 1) // M
        carry = Carry(state.fast, tuple(past.before(waiting) for past in state.upper_pasts))
        self._load(carry, state.position - waiting, state.start - waiting, max_step_norm)
        self._lower.load(state.lower_pasts, state.position, state.start)
        targets = torch.cat((state.targets, tokens), 1)[:, 0 if waiting else 1 :]
        counted = torch.cat((state.targets_mask, mask), 1)[:, 0 if waiting else 1 :]
        hidden, runs = self._hidden_states(state.hidden, tokens[:, :read]), (waiting + read) // M
        found = [
            self._score(x, targets[:, i * M :][:, :M], counted[:, i * M :][:, :M], runs - i)
            for i, x in enumerate(itertools.islice(hidden, steps))
        ]
        nll, fast = [one.nll for one in found[waiting // M :]], from_matrices(self._fast_weights())
        waits, rest, rest_counted = runs > steps, targets[:, steps * M :], counted[:, steps * M :]
        if waits:
            found.append(self._score(next(hidden), rest, rest_counted, 1))
            nll.append(found[-1].nll[:, : M - 1])
        after = ReadingState(
            **state.moved(read),
            fast=fast,
            lower_pasts=_copied(self._lower.pasts()),
            upper_pasts=_copied(self._upper.pasts(extra=M if waits else 0)),
            hidden=self._hidden.clone() if waits else state.hidden[:, :0],
            targets=rest.clone() if waits else state.targets[:, :0],
            targets_mask=rest_counted.clone() if waits else state.targets_mask[:, :0],
            output=found[-1].output,
        )
        taken = found[:steps]
        refusals = [one.refused for one in taken if one.refused is not None]
        return after, nll, [one.grad_norm for one in taken], refusals

    @_alone
    def step(
        self,
        carry: Carry,
        hidden: Tensor,
        targets: Tensor,
        mask: Tensor,
        *,
        position: int,
        start: int | Tensor,
        max_step_norm: Tensor | None,
    ) -> Update:
        """Takes the step on one mini-batch and nothing else; args as in `longread.inner_loop.finishing.finish`."""
        self._load(carry, position, start, max_step_norm)
        found = self._score(hidden, targets, mask, 1)
        return Update(self._fast_weights(), found.grad_norm, found.refused)

    def rehearse(self, state: ReadingState) -> None:
        """Computes once, plainly and on one stream, what graphs from `state` on are made of."""
        for longest in (self.M, self.stretch):
            self._lower.load(state.lower_pasts, state.position, state.start)
            filling = self.M * math.ceil(self._lower.missing / self.M)
            tokens = min(longest, filling or longest)
            self._lower.run(tokens, 1, functools.partial(self._run_lower, tokens), replayed=False)
        self._upper.load(state.upper_pasts, state.position, state.start)
        self._upper.run(self.M, 1, self._run_upper, replayed=False)

    def _score(self, hidden: Tensor, targets: Tensor, mask: Tensor, runs: int) -> _Scored:
        """Of a mini-batch and as many targets as are known; the step on it is in the weights."""
        known = targets.shape[1]
        self._hidden.copy_(hidden)
        self._targets[:, :known].copy_(targets)
        self._mask[:, :known].copy_(mask)
        kept = *self._fast, *self._working
        found = self._upper.run(self.M, runs, self._run_upper, *kept, replayed=self.usable)
        return _Scored(*(None if x is None else x.clone() for x in found))  # type: ignore[arg-type]

    def _hidden_states(self, waiting: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        """The input of the upper half, mini-batch after mini-batch: what is waiting, and what the lower half makes of
        the tokens, whose next run is under way by then."""
        filling = min(tokens.shape[1], self.M * math.ceil(self._lower.missing / self.M))
        lengths = self._lengths(filling) + self._lengths(tokens.shape[1] - filling)
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
            if i == 0:
                yield from waiting.split(self.M, 1) if waiting.shape[1] else ()
            else:
                upper.wait_event(made[i - 1])
                yield from self._ahead[(i - 1) % 2, :, : lengths[i - 1]].split(self.M, 1)

    def _lengths(self, tokens: int) -> list[int]:
        """Of the runs of the lower half: stretches, then mini-batches times powers of two. So there are few runs, which
        cost launches while they are plain, and few lengths, of which each has graphs of its own."""
        stretches, rest = divmod(tokens, self.stretch)
        count = rest // self.M
        powers = [1 << i for i in reversed(range(count.bit_length())) if count >> i & 1]
        return [self.stretch] * stretches + [self.M * power for power in powers]

    def _run_lower(self, tokens: int) -> Tensor:
        strips = self._lower
        hidden, own = self.model.lower(self._tokens[:, :tokens], strips.pasts(), start=strips.position)
        strips.append(own)
        strips.position += tokens
        return hidden

    def _run_upper(self) -> _Scored:
        strips, optimizer = self._upper, optimizer_named(self.inner.optimizer)
        working = [w.detach().requires_grad_() for w in self._working]
        step = inner_gradient(
            self.model,
            working,
            strips.pasts(),
            self._hidden,
            self._targets,
            self._mask,
            start=strips.position,
            order=0,
            surprise=self.inner.surprise,
        )
        strips.append(step.own)
        strips.position += self.M
        update = optimizer.step_(
            self._fast,
            step.gradients,
            self._working,
            lr=self.inner.lr,
            clip=self.inner.clip,
            max_step_norm=self._max_step_norm,
        )
        return _Scored(step.nll, update.grad_norm, update.refused, step.output[:, -1])

    def _load(self, carry: Carry, position: int, start: int | Tensor, max_step_norm: Tensor | None) -> None:
        """Takes up what the upper half needs at `position`; `start` says it of each sequence."""
        torch.cuda.current_stream().wait_stream(self._lower_graphs.stream)  # at what a reading left that was broken off
        if self._max_step_norm is not None and max_step_norm is not None:
            self._max_step_norm.copy_(max_step_norm)
        self._upper.load(carry.pasts, position, start)
        for place, copy, w in zip(self._fast, self._working, matrices(carry.fast), strict=True):
            place.copy_(w)
            copy.copy_(w)

    def _fast_weights(self) -> tuple[Tensor, ...]:
        return tuple(w.clone() for w in self._fast)


@contextlib.contextmanager
def no_inference_mode() -> Iterator[None]:
    """What is made in a caller's `torch.inference_mode` could not be changed in place after it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def place_of(model: Transformer) -> Hashable:
    """What graphs of a model hang on: where its parameters lie, and the type of its products."""
    return model.dtype, *(parameter.data_ptr() for parameter in model.parameters())


def _copied(pasts: Sequence[Past]) -> tuple[Past, ...]:
    return tuple(Past(*(x.clone() for x in past)) for past in pasts)


_READERS: weakref.WeakKeyDictionary[Transformer, dict[tuple[int, InnerConfig, bool], CapturedReader]] = (
    weakref.WeakKeyDictionary()
)
"""Captures take seconds and memory, so a model keeps its own until it is gone."""
_LOCK = threading.Lock()


def captured_reader(
    model: Transformer, state: ReadingState, inner: InnerConfig, *, guard: bool
) -> CapturedReader | None:
    """A reader that can go on from `state`, for a device with CUDA graphs; None amid a mini-batch, where pasts are of
    odd lengths, and where memory is short."""
    config, waiting = model.config, state.hidden.shape[1]
    before, B = state.position - waiting, state.output.shape[0]
    if waiting not in (0, config.mini_batch_size) or not _can_capture_from(model, before):
        return None
    windows, split = _windows(model), model.num_lower_attentions
    lengths = [past.key.shape[2] for past in (*state.lower_pasts, *state.upper_pasts)]
    whole = [min(w, state.position) for w in windows[:split]] + [min(w, before) + waiting for w in windows[split:]]
    return _kept_reader(model, B, inner, guard, B > 1, config.num_blocks) if lengths == whole else None


def captured_step(
    model: Transformer, batch_size: int, position: int, inner: InnerConfig, *, guard: bool
) -> CapturedReader | None:
    """The same for a step alone, on a mini-batch that begins at `position`: where memory is short, one sequence is
    spared as well."""
    if not _can_capture_from(model, position):
        return None
    lower = model.num_lower_attentions if batch_size == 1 else 0  # which do without strips
    return _kept_reader(model, batch_size, inner, guard, True, model.config.num_blocks - lower)


def _windows(model: Transformer) -> list[int]:
    return [model.config.window_of(i) or 0 for i in range(model.config.num_blocks)]


def _can_capture_from(model: Transformer, position: int) -> bool:
    """Whether every attention sees a window and nothing else, and at `position` these are full, or full of
    mini-batches."""
    config = model.config
    if (config.mixer, config.attention) != ("attention", "window") or config.kept_tokens:
        return False
    return position >= max(_windows(model)) or position % config.mini_batch_size == 0


def _kept_reader(
    model: Transformer, batch_size: int, inner: InnerConfig, guard: bool, frugal: bool, blocks: int
) -> CapturedReader | None:
    """The model's reader of so many sequences; a new one that is `frugal` takes only a `SHARE` of the free memory for
    the strips of so many blocks, or is not made."""
    with _LOCK, no_inference_mode():  # else threads that come at once would each make one
        readers, key = _READERS.setdefault(model, {}), (batch_size, inner, guard)
        reader = readers.pop(key, None)
        if reader is None or reader.place != place_of(model):
            tokens = 2 * max(*_windows(model), STRETCH)
            strips = batch_size * tokens * 2 * blocks * model.config.kv_width * model.dtype.itemsize
            if frugal and strips * SHARE > free_bytes(model.device):
                return None
            reader = CapturedReader(model, *key)
        readers[key] = reader
        if len(readers) > READERS:
            del readers[next(iter(readers))]
        return reader if reader.usable else None
