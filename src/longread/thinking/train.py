"""One training run, from an empty directory or from its checkpoint to a finished agent.

    RUN/run.json                 what was run, with which code, where and when
    RUN/metrics.jsonl            a row per step: first those of the world model, then those of the agent
    RUN/checkpoint.safetensors   where training resumes
    RUN/agent.safetensors        the finished agent with its world model (longread.thinking.thinker)

Everything that a step depends on is its number, weights, moments of the optimizer and the boards that selection keeps.
So a resumed run computes bit for bit what an uninterrupted one computes.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longread import __version__, files, record
from longread.config import TrainingHalted, UserError
from longread.thinking.cohort import Cohort
from longread.thinking.config import ThinkingConfig
from longread.thinking.thinker import FILE, Thinker, save_thinker

RUN_FILE, METRICS_FILE, CHECKPOINT = "run.json", "metrics.jsonl", "checkpoint.safetensors"
CHECKPOINT_KIND = "thinking checkpoint"
LONGEST_UNSAVED = 60.0
"""Seconds between checkpoints where `checkpoint_every` does not say when."""

Row = dict[str, Any]


@dataclass(frozen=True)
class ThinkingTrainResult:
    """How a run ended."""

    step: int
    """Finished steps, over all starts of the run."""
    row: Row | None
    """The last row of metrics; None if there was nothing left to do."""
    thinker: Thinker | None
    """None if the run was interrupted: it can be resumed."""


def train(
    config: ThinkingConfig,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    on_step: Callable[[Row], None] | None = None,
) -> ThinkingTrainResult:
    """Trains a world model, then an agent, and leaves the run in the directory `out`.

    Args:
        resume: go on from the checkpoint in `out`; from the beginning if there is none.
        stopped: asked after each step; once it says yes, a checkpoint is written and the run ends.
        on_step: called with each row of metrics.jsonl once it is written.

    Raises:
        UserError: config and `out` do not go together, or another process trains there.
        TrainingHalted: a number is not finite.
    """
    out = Path(out)
    _refuse_or_clear(out, resume)
    with files.held(out):
        _refuse_or_clear(out, resume)
        run = _ThinkingRun(config, out, device, resume)
        run.describe()
        row = None
        while run.cohort.step < run.cohort.steps and not stopped():
            row = run.advance()
            if run.should_save:
                run.save()
            if on_step is not None:
                on_step(row)
        if run.cohort.step > run.saved_step:
            run.save()
        finished = run.finish() if run.cohort.step >= run.cohort.steps else None
    return ThinkingTrainResult(run.cohort.step, row, finished)


def _refuse_or_clear(out: Path, resume: bool) -> None:
    if not resume and any(os.path.exists(out / name) for name in (RUN_FILE, METRICS_FILE, CHECKPOINT, FILE)):
        raise UserError(f"{out} already holds a run; resume it, or choose another directory")
    if resume:
        files.remove_temporaries(out)


class _ThinkingRun:
    """The state of a run and what can be done with it, in the order in which it is done."""

    def __init__(self, config: ThinkingConfig, out: Path, device: str | torch.device, resume: bool) -> None:
        self.config, self.out = config, out
        self.log = record.MetricsLog(out / METRICS_FILE)
        self.cohort = Cohort(config, device=device)
        self.saved_step, self.saved_at = 0, time.monotonic()
        if resume:
            self._restore()

    def _restore(self) -> None:
        size = 0
        if os.path.exists(self.out / CHECKPOINT):
            tensors, state = files.read_tensors(self.out / CHECKPOINT, kind=CHECKPOINT_KIND)
            self._refuse_other(state["config"])
            self.cohort.restore(state["step"], tensors)
            self.saved_step, size = state["step"], state["metrics_bytes"]
        elif os.path.exists(self.out / FILE):
            raise UserError(f"{self.out} holds an agent but no checkpoint to resume from; train into another directory")
        self.log.truncate(size)

    def _refuse_other(self, begun: dict[str, Any]) -> None:
        changed = [name for name, value in self.config.as_dict().items() if begun.get(name) != value]
        if changed:
            raise UserError(
                f"{self.out} was begun with another {', '.join(changed)}; resume it as it was begun, or train into "
                "another directory"
            )

    def describe(self) -> None:
        """Leaves run.json, to which each resumption adds itself."""
        path = self.out / RUN_FILE
        now = {
            "command": list(sys.argv),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": record.code_commit(),
            "versions": {"longread": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "hardware": record.hardware(),
        }
        if os.path.exists(path):
            run = files.read_json(path, kind="run")
            self._refuse_other(run["config"])
            run["resumed"] = [*run["resumed"], now | {"step": self.cohort.step}]
        else:
            run = {"config": self.config.as_dict(), **now, "resumed": []}
        files.write_json_atomically(path, run, kind="run")

    def advance(self) -> Row:
        """Takes one step, writes its row, and returns it."""
        started = time.monotonic()
        part = "world model" if self.cohort.learns_the_world else "agent"
        figures = {name: values[0] for name, values in self.cohort.advance().items()}
        row: Row = {"step": self.cohort.step, "part": part, **figures, "seconds": time.monotonic() - started}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise self.halt(f"the loss is {row['loss']} and the norm of its gradient {row['grad_norm']}")
        self.log.append(row)
        return row

    def halt(self, problem: str) -> TrainingHalted:
        """The exception for a problem of the last step."""
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint"
        return TrainingHalted(
            f"training halted at step {self.cohort.step}: {problem}; {kept}; train again with a lower lr, here "
            f"{self.config.lr:g}, or world_model.lr, {self.config.world_model.lr:g}"
        )

    @property
    def should_save(self) -> bool:
        """Whether a checkpoint is due, by number or by the clock."""
        every = self.config.checkpoint_every
        if every is None:
            return time.monotonic() - self.saved_at > LONGEST_UNSAVED
        return self.cohort.step // every > self.saved_step // every

    def save(self) -> None:
        """Writes the checkpoint over the one before; afterwards it is the new one or, after an error, the old one."""
        tensors = self.cohort.tensors()
        for name, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise self.halt(f"{name} is not finite after the update")
        self.log.make_durable()
        state = {"step": self.cohort.step, "config": self.config.as_dict(), "metrics_bytes": self.log.size}
        files.write_tensors_atomically(self.out / CHECKPOINT, tensors, state, kind=CHECKPOINT_KIND)
        self.saved_step, self.saved_at = self.cohort.step, time.monotonic()

    def finish(self) -> Thinker:
        """Writes the finished agent."""
        provenance = {"step": self.cohort.step, "commit": record.code_commit()}
        thinker = Thinker.of(self.config, self.cohort.tensors(), provenance, self.cohort.world.device)
        save_thinker(self.out / FILE, thinker)
        return thinker
