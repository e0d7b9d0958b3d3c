"""Writes the checkpoints of a run: one process at once, several ranks while training goes on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from longread.checkpoint.training import delete_old, write_checkpoint
from longread.config import InnerConfig
from longread.model import Transformer, undrawn
from longread.parallel import ALONE, DividedRows, RankFailed, World, agreed
from longread.parallel.rows import row_mesh

_PLACE = "the end of a checkpoint"


class CheckpointWriter:
    """The checkpoints of a run, written one after the other. In a `with`: its end waits for the last.

    Of several ranks each copies what it will write to the CPU and goes on; a thread writes it and commits, through
    groups of its own. The copies take memory of the host until then: 8 bytes a parameter for the moments, divided among
    the ranks that divide rows, and on rank 0 the weights, 4 bytes a parameter, once more.

    A save that fails is raised by the `save` or `wait` that follows, on all ranks: on the one that failed what it was,
    elsewhere `RankFailed`. After a `RankFailed` of one that is late or gone, nothing more can be saved.
    """

    def __init__(
        self,
        run: Path,
        world: World = ALONE,
        rows: DividedRows | None = None,
        *,
        keep: int = 2,
        milestone_every: int | None = None,
        newest: Path | None = None,
        spare: Path | None = None,
    ) -> None:
        """All ranks make it together. Deletes what a process that was killed should have deleted after `newest`.

        Args:
            rows: what the optimizer steps; needed by several ranks.
            keep, milestone_every: which checkpoints stay (`longread.checkpoint.kept`).
            newest: the checkpoint that the run goes on from.
            spare: an older one that stays.
        """
        self.newest = newest
        """The newest checkpoint that is finished; a save under way is not yet."""
        self._world = world
        self._write = partial(write_checkpoint, run, keep=keep, milestone_every=milestone_every)
        if newest is not None and world.is_first:
            delete_old(run, newest, keep=keep, milestone_every=milestone_every, spare=spare)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if world.size > 1:
            if rows is None:
                raise ValueError("several ranks need the rows that each of them steps")
            from longread.checkpoint.sharded import staged_moments  # with DCP, which takes two seconds to import

            self._beside = world.beside("checkpoint")
            self._staged_moments = partial(
                staged_moments, rows=rows, mesh=row_mesh(world.size, rows.count, "cpu", world.deadline)
            )

    @property
    def failed(self) -> bool:
        """Whether a save has failed that nobody has waited for yet. Ranks may see it at different times."""
        return self._error is not None

    def save(
        self,
        step: int,
        *,
        model: Transformer,
        inner: InnerConfig,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        tokenizer_fingerprint: str | None = None,
        spare: Path | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begins the checkpoint of `step` finished steps, once the one before is finished; all ranks together.

        Args:
            optimizer: the moments, as `parameter.moment`; of several ranks those of `rows.own`.
            spare: an older checkpoint that stays.
            weights: of rank 0, whole and on the CPU, where parameters of `model` are divided too; they are not copied.

        Raises `UserError` if the one before could not be written, or one process this one; the older ones are whole.
        """
        self.wait()
        if self._world.size == 1:
            self.newest = self._write(
                step,
                model=model,
                inner=inner,
                optimizer=optimizer,
                state=state,
                tokenizer_fingerprint=tokenizer_fingerprint,
                spare=spare,
            )
            return
        with self._world.together("copying a checkpoint to the CPU"):
            write = partial(
                self._write,
                step,
                model=_staged(model, weights) if self._world.is_first else model,
                inner=inner,
                optimizer=self._staged_moments(optimizer),
                state=copy.deepcopy(dict(state)),
                tokenizer_fingerprint=tokenizer_fingerprint,
                spare=spare,
                world=self._beside,
            )
        self._beside.step = step
        self._thread = threading.Thread(target=self._run_thread, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run_thread(self, write: Callable[[], Path]) -> None:
        try:
            self.newest = write()
        except BaseException as error:
            self._error = error

    def wait(self) -> Path | None:
        """Returns `newest` once the save under way is finished; all ranks together. Raises what made it fail, once."""
        underway, error = self._thread is not None, self._finished()
        if underway and not _is_of_a_rank_gone(error):
            try:
                found = self._world.word(None if error is None else str(error), _PLACE)
            except RankFailed as gone:
                error, found = error or gone, None
            if found is not None and error is None:
                error = failed = RankFailed(f"rank {found[0]} failed at {_PLACE}: {found[1]}")
                failed.is_said_elsewhere = True
        if error is not None:
            raise agreed(error)
        return self.newest

    def _finished(self) -> BaseException | None:
        """The error of the save under way; None if it is finished, or if there is none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
        elif failure := self._finished():  # the other ranks may be anywhere
            error.add_note(f"The checkpoint under way was not written either: {failure}")


def _is_of_a_rank_gone(error: BaseException | None) -> bool:
    """Whether ranks waited in vain, so that nothing can be asked of them."""
    return isinstance(error, RankFailed) and not error.is_said_elsewhere


def _staged(model: Transformer, weights: Mapping[str, Tensor] | None) -> Transformer:
    """A copy of a model on the CPU."""
    if weights is None:
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    staged = undrawn(model.config)
    staged.load_state_dict(dict(weights), assign=True)
    return staged
