"""One outer step: each rank's gradient, what all decide about it, the sum, the update.

Nothing is decided by one rank alone. When their gradients are under way all vote: has anybody left the step, has
anybody run out of memory. Then the sum is under way too, and a GPU has work while the processors talk. When it is done
all tell what they have seen: losses, a signal, a clock. So all see the same numbers, and what follows from numbers they
do alike.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longread.config import RunConfig
from longread.data import Batch, Sampler
from longread.model import Transformer, is_out_of_memory
from longread.parallel import DividedRows, FullySharded, World
from longread.train.captured import CapturedGradient
from longread.train.gradient import BatchGradient, InnerSums, StepLeft, accumulate_gradient, inner_sums
from longread.train.meta_step import FullyShardedGradient
from longread.train.optimizer import update
from longread.train.quarantine import keep_batch
from longread.train.rank_log import steps
from longread.train.seen import Seen, seen_by_all
from longread.train.settling import leaner
from longread.train.sharing import Share
from longread.train.step_clock import StepClock
from longread.train.stopping import StopSignal, not_finite_in
from longread.train.throughput import Throughput

Row = dict[str, Any]

_TOGETHER = {"reduce": "the sum of the gradients", "gather": "the new weights of all"}
"""Parts of a step that ranks do together, as they are said to those that wait."""


class NotFinite(Exception):
    """Loss or gradient of a step are no numbers; nothing was changed. The message says what and, of several, where."""


class NothingLess(Exception):
    """Memory ran out, and there is nothing left that takes less."""


class _Short(Exception):
    """A rank ran out of memory before the others depended on it."""


class OuterStep:
    """Takes the outer steps of a run. All ranks take them together."""

    def __init__(
        self,
        config: RunConfig,
        exact: RunConfig,
        model: Transformer,
        optimizer: torch.optim.AdamW,
        rows: DividedRows,
        *,
        sampler: Sampler,
        share: Share,
        world: World,
        device: torch.device,
        out: Path,
    ) -> None:
        """`exact` is `config`, of this rank's share of a batch, with what it leaves open settled."""
        self.config, self.exact, self.model, self.optimizer, self.rows = config, exact, model, optimizer, rows
        self.sampler, self.share, self.world, self.device, self.out = sampler, share, world, device, out
        self.was_left = False
        """A step was left, and may still run on the device."""
        self.is_updating = False
        """The step has begun to change what others see: an error here is one of all ranks."""
        self.clock_is_due = False
        """Rank 0 finds it time for a checkpoint."""
        self._drawn: dict[int, Batch] = {}
        """This rank's share of the batches of this step and the next."""
        self._clock, self._throughput = StepClock(device), Throughput(config, world.size, device)
        self._gradient: Callable[..., BatchGradient] | None = None
        """Made when it is first needed."""

    def _new_gradient(self) -> Callable[..., BatchGradient]:
        if isinstance(self.rows, FullySharded):
            return FullyShardedGradient(self.rows, self.exact)
        if self.device.type == "cuda":
            return CapturedGradient(self.model, self.exact, self._is_good_everywhere)
        return functools.partial(accumulate_gradient, self.model, self.exact)

    def take(self, step: int, stop: StopSignal, *, is_due: Callable[[], bool]) -> Row | None:
        """Takes step number `step`, counted from 0, and returns its row; with less at a time where memory runs out.

        A signal leaves the step as if it had not begun, between two micro-batches or, on a GPU, at once: it may be
        long, and the weights do not change before its end. None then.

        Args:
            is_due: whether it is time for a checkpoint.

        Raises `NotFinite` before the weights could be spoiled, and `NothingLess`.
        """
        while True:
            try:
                return self._take(step, stop, is_due)
            except _Short:
                pass
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.world.size > 1:  # the others cannot know: by `_Short` they do
                    self.is_updating = True
                    raise NothingLess from None
            self._make_room(step)  # only here, where nothing holds the tensors of the step any more

    def _make_room(self, step: int) -> None:
        less = None if self.is_updating else leaner(self.config, self.exact, self.device)
        self.model.zero_grad(set_to_none=True)
        before = self.exact
        self._gradient = None  # and with it what a graph has captured
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if less is None:
            raise NothingLess
        self.exact, size = less, less.micro_batch_size
        warnings.warn(
            f"out of memory at step {step + 1} with micro_batch_size {before.micro_batch_size} and recompute "
            f"{before.recompute}: goes on with {size} and {less.recompute}; sums round differently from there on",
            stacklevel=4,
        )

    def _take(self, step: int, stop: StopSignal, is_due: Callable[[], bool]) -> Row | None:
        began, self.world.step = time.monotonic(), step + 1
        inner_lr = self.config.inner.lr_at(step)
        batch = self._batch(step)
        agreed, found = self._vote(batch, *self._compute(batch, inner_lr, stop))
        self._batch(step + 1)  # drawn while a GPU is still at work
        if agreed is None or found is None:
            self._leave()
            return None
        tokens, weight = agreed
        self.is_updating = self.world.size > 1
        with self._part("reduce"):  # on the device it follows the gradient, which nobody has waited for
            self.rows.reduce(weight)
            norm = self.rows.norm()
        done = self._done()
        self.world.wait(lambda: stop.requested or done(), at="the sum of the gradients")
        seen = self._see(found, batch, weight, norm) if done() else Seen(left=True)
        seen = seen_by_all(self.world.table(*seen._replace(due=self.world.is_first and is_due()), at="the losses"))
        self.clock_is_due = bool(seen.due)
        if seen.left:
            self._leave()
            return None
        row: Row = {"step": step + 1, "tokens": tokens}
        if math.isfinite(seen.loss) and math.isfinite(seen.norm):
            self.is_updating = True
            row |= {"loss": seen.loss, "grad_norm": seen.norm}
            norm.fill_(seen.norm)  # between machines it may differ by a bit, and so would what is clipped
            optimizer = self.config.optimizer
            row["lr"] = update(self.model, self.optimizer, optimizer, step, norm, self.rows, part=self._part)
            means = InnerSums(seen.inner_steps, seen.inner_norm, seen.inner_clipped).means()
            row |= {"inner_lr": inner_lr} | means if found.inner_grad_norm.numel() else {}
        else:
            row["tokens"] = 0
            row["skipped"] = self._leave_out(step, batch, found, norm)
        self.is_updating = False
        seconds = time.monotonic() - began
        row |= self._throughput.fields(tokens, seconds, seen.parts, self.exact.recompute)
        if self.device.type == "cuda":  # reserved, not allocated: what lies in the pools of graphs must be there too
            row["peak_memory_bytes"] = int(seen.peak)
        steps.info("step %d: %.3f s", step + 1, row["seconds"])
        return row

    def _compute(self, batch: Batch, inner_lr: float, stop: StopSignal) -> tuple[BatchGradient | None, bool]:
        """The gradient of this rank, None where it was left or lacked memory; and whether it lacked memory."""
        self._gradient = self._gradient or self._new_gradient()
        try:
            with self._clock.part("gradient"):
                found = self._gradient(batch.to(self.device), inner_lr=inner_lr, stopped=lambda: self._is_stopped(stop))
            return found, False
        except StepLeft:
            return None, False
        except (MemoryError, RuntimeError) as error:
            if not (is_out_of_memory(error) and self._is_alone):
                raise
            return None, True

    def _vote(
        self, batch: Batch, found: BatchGradient | None, short: bool
    ) -> tuple[tuple[int, float] | None, BatchGradient | None]:
        """The step of all ranks, or None if one has left it; and `found`. Raises `_Short` if one lacks memory.

        It is the targets of all ranks, and this rank's share of the sequences that have some, of which the loss is a
        mean.
        """
        own = int(batch.loss_mask.any(1).sum()), int(batch.loss_mask.sum())
        left = found is None and not short
        leaving, lacking, sequences, tokens = self.world.total(left, short, *own, at="the gradient")
        if lacking:
            raise _Short
        agreed = int(tokens) // self.share.copies, own[0] / sequences if sequences else 1.0
        return None if leaving else agreed, found

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Of the step, timed; what ranks do together names who is late."""
        with contextlib.ExitStack() as stack:
            if name in _TOGETHER:
                stack.enter_context(self.world.waiting(_TOGETHER[name]))
            stack.enter_context(self._clock.part(name))
            yield

    def _see(self, found: BatchGradient, batch: Batch, weight: float, norm: Tensor) -> Seen:
        finite = bool(found.inner_grad_norm.isfinite().all())
        sums = inner_sums(found.inner_grad_norm.cpu(), batch.loss_mask, self.config.inner.clip)
        peak = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0
        self._clock.settle()
        loss = weight * (found.loss.item() if finite else math.nan)
        parts = self._clock.take()
        steps.info("step %d: %.3f s for the gradient of this rank", self.world.step, parts.get("gradient", math.nan))
        return Seen(False, loss, norm.item(), *sums, peak=peak, **parts)

    def _leave(self) -> None:
        """A step as if it had not begun."""
        self.was_left, self.is_updating = self.device.type == "cuda", False
        self.rows.clear()

    @property
    def _is_alone(self) -> bool:
        """Whether a rank computes its gradient without the others."""
        return not isinstance(self.rows, FullySharded) and self.share.copies == 1

    def _is_stopped(self, stop: StopSignal) -> bool:
        """Whether to leave a step between two micro-batches: all ranks, where they compute these together."""
        if self._is_alone:
            return stop.requested
        return bool(*self.world.agree(stop.requested, at="the next micro-batch"))

    def _is_good_everywhere(self, good: bool) -> bool:
        if self._is_alone:
            return good
        return not any(self.world.agree(not good, at="comparing what was captured"))

    def release(self) -> None:
        """Forgets what was captured: NCCL waits for graphs that hold its sums when ranks part."""
        self._gradient = None
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":  # graphs hang in circles; nothing is captured elsewhere
            gc.collect()

    def _batch(self, step: int) -> Batch:
        self._drawn = {number: batch for number, batch in self._drawn.items() if number >= step - 1}
        if step not in self._drawn:
            self._drawn[step] = self.share.batch(self.sampler, step)
        return self._drawn[step]

    def _done(self) -> Callable[[], bool]:
        """Asks whether the device has computed everything that it was given so far."""
        if self.device.type != "cuda":
            return lambda: True
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return done.query

    def _leave_out(self, step: int, batch: Batch, found: BatchGradient, norm: Tensor) -> str:
        """Keeps the batches that are not finite; then says what they are, or raises it, as the config wants it."""
        own = self.rows.unsummed()
        own_norm = norm if self.world.size == 1 else torch.nn.utils.get_total_norm(own.values())
        problem = not_finite_in(own, found, own_norm)
        said = self.world.word(problem, at="what is not finite")
        if said is None:  # no rank alone, as far as is known
            summed = {name: rows.grad for name, rows in self.rows.own.items() if rows.grad is not None}
            problem = not_finite_in(summed, found, norm.new_tensor(math.nan))
            said = self.world.word(problem, at="what is not finite in the sum")
            where = f"all ranks together: {said[1] if said else problem}"
        else:
            where = f"rank {said[0]}: {said[1]}" if self.world.size > 1 else said[1]
        with self.world.together("keeping a batch that is not finite"):
            if problem is not None:
                keep_batch(self.out, step + 1, self.world.rank, batch, problem)
        self.rows.clear()
        if self.config.bad_batch == "halt":
            raise NotFinite(where)
        warnings.warn(f"step {step + 1} is skipped: {where}; its batch is kept in {self.out}", stacklevel=6)
        return where
