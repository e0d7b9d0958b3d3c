"""One outer step: each rank's gradient, what all decide about it, the sum, the update.

Nothing is decided by one rank alone. After the gradient all vote: was anybody asked to stop, has anybody run out of
memory, is a checkpoint due by the clock of rank 0. What they know of the losses is added up, so all see the same
numbers, and whatever follows from numbers they do alike.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import warnings
from collections.abc import Callable
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
from longread.train.settling import leaner
from longread.train.sharing import Share
from longread.train.stopping import StopSignal, not_finite_in

Row = dict[str, Any]


class NotFinite(Exception):
    """Loss or gradient of a step are no numbers; nothing was changed. The message says what and, of several, where."""


class NothingLess(Exception):
    """Memory ran out, and there is nothing left that takes less."""


class _ShortElsewhere(Exception):
    """Another rank ran out of memory."""


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
        self._gradient: Callable[..., BatchGradient] | None = None
        """Made when it is first needed."""

    def _new_gradient(self) -> Callable[..., BatchGradient]:
        if isinstance(self.rows, FullySharded):
            return FullyShardedGradient(self.rows, self.exact)
        if self.device.type == "cuda":
            return CapturedGradient(self.model, self.exact)
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
            except _ShortElsewhere:
                pass
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self.is_updating:  # else the others are beyond their vote
                    self._vote(is_due, short=True)
            self._make_room(step)  # only here, where nothing holds the tensors of the step any more

    def _vote(self, is_due: Callable[[], bool], *, left: bool = False, short: bool = False) -> tuple[bool, bool]:
        """After a gradient: whether any rank has left the step, and whether any lacks memory."""
        votes = self.world.agree(left, short, self.world.is_first and is_due(), at="the gradient")
        anyone_left, anyone_short, self.clock_is_due = map(bool, votes)
        return anyone_left, anyone_short

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
        self._gradient = self._gradient or self._new_gradient()
        found = None
        with contextlib.suppress(StepLeft):
            found = self._gradient(batch.to(self.device), inner_lr=inner_lr, stopped=lambda: self._is_stopped(stop))
        self._batch(step + 1)  # drawn while a GPU is still at work
        left = found is None or stop.comes_before(self._done())
        own = time.monotonic() - began
        anyone_left, anyone_short = self._vote(is_due, left=left)
        if anyone_short:
            raise _ShortElsewhere
        if anyone_left or found is None:
            self.was_left = self.device.type == "cuda"
            self.model.zero_grad(set_to_none=True)
            return None
        tokens, weight = self._weigh(batch)
        self.is_updating = self.world.size > 1
        self.rows.reduce(weight)
        norm = self.rows.norm()
        self.world.wait(self._done(), at="the sum of the gradients")
        row: Row = {"step": step + 1, "tokens": tokens}
        loss, sums = self._sum(batch, found, weight)
        if math.isfinite(loss) and norm.isfinite():
            self.is_updating = True
            row |= {"loss": loss, "grad_norm": norm.item()}
            row["lr"] = update(self.model, self.optimizer, self.config.optimizer, step, norm, self.rows)
            row |= {"inner_lr": inner_lr} | sums.means() if found.inner_grad_norm.numel() else {}
        else:
            row["tokens"] = 0
            row["skipped"] = self._leave_out(step, batch, found, norm)
        self.is_updating = False
        row["seconds"] = time.monotonic() - began
        row["tokens_per_second"] = tokens / row["seconds"]
        if self.device.type == "cuda":  # reserved, not allocated: what lies in the pools of graphs must be there too
            (most,) = self.world.agree(torch.cuda.max_memory_reserved(self.device), at="the peak of memory")
            row["peak_memory_bytes"] = int(most)
        steps.info("step %d: %.3f s, of which %.3f s for the gradient of this rank", step + 1, row["seconds"], own)
        return row

    def _is_stopped(self, stop: StopSignal) -> bool:
        """Whether to leave a step between two micro-batches: all ranks, where they compute these together."""
        alone = not isinstance(self.rows, FullySharded) and self.share.copies == 1
        return stop.requested if alone else bool(*self.world.agree(stop.requested, at="the next micro-batch"))

    def release(self) -> None:
        """Forgets what was captured: NCCL waits for graphs that hold its sums when ranks part."""
        self._gradient = None
        self.model.zero_grad(set_to_none=True)
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

    def _weigh(self, batch: Batch) -> tuple[int, float]:
        """Targets of all ranks, and this rank's share of the sequences that have some, of which the loss is a mean."""
        own = int(batch.loss_mask.any(1).sum())
        sequences, tokens = self.world.total(own, int(batch.loss_mask.sum()), at="counting targets")
        return int(tokens) // self.share.copies, own / sequences if sequences else 1.0

    def _sum(self, batch: Batch, found: BatchGradient, weight: float) -> tuple[float, InnerSums]:
        """The loss of the whole batch, nan if an inner gradient is not finite anywhere, and what inner steps were."""
        own = found.loss.item() if found.inner_grad_norm.isfinite().all() else math.nan
        sums = inner_sums(found.inner_grad_norm.cpu(), batch.loss_mask, self.config.inner.clip)
        loss, *added = self.world.total(weight * own, *sums, at="the sum of the losses")
        return loss, InnerSums(*added)

    def _leave_out(self, step: int, batch: Batch, found: BatchGradient, norm: Tensor) -> str:
        """Keeps the batches that are not finite; then says what they are, or raises it, as the config wants it."""
        own = self.rows.unsummed()
        own_norm = norm if self.world.size == 1 else torch.nn.utils.get_total_norm(own.values())
        problem = not_finite_in(own, found, own_norm)
        said = self.world.word(problem, at="what is not finite")
        rank, problem_of = said or (0, "the gradients of all ranks together are too large for their norm")
        with self.world.together("keeping a batch that is not finite"):
            if problem is not None or (said is None and self.world.is_first):
                keep_batch(self.out, step + 1, self.world.rank, batch, problem or problem_of)
        self.rows.clear()
        where = f"rank {rank}: {problem_of}" if self.world.size > 1 else problem_of
        if self.config.bad_batch == "halt":
            raise NotFinite(where)
        warnings.warn(f"step {step + 1} is skipped: {where}; its batch is kept in {self.out}", stacklevel=6)
        return where
