"""Training as people watch it: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

from longread.config import RunConfig

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Give it to `train` as `on_step` inside a `with`; it writes to stderr, so that stdout stays free for results."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self._total = config.steps
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._bar: Bar | None = None
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._begun: tuple[int, float] | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(config.name, total=config.steps, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, SystemExit):
                self._bar.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Shows one row of metrics.jsonl, if anybody still looks: a run does not end for want of a screen."""
        try:
            self._show(row)
        except (OSError, SystemExit):  # rich makes an end of the program of a pipe that has no reader any more
            self._console.quiet = True

    def _show(self, row: Mapping[str, Any]) -> None:
        if self._begun is None:
            self._begun = (row["step"], time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], numbers=describe(row))
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES and self._bar is None
        if due or "validation_loss" in row or row["step"] == self._total:
            self._last_line = now
            self._console.print(f"step {row['step']}/{self._total}  {describe(row)}{self._remaining(row['step'], now)}")

    def _remaining(self, step: int, now: float) -> str:
        first, begun = self._begun or (step, now)
        if step == first or step == self._total:
            return ""
        seconds = round((now - begun) / (step - first) * (self._total - step))
        return f"  {timedelta(seconds=seconds)} left"


def describe(row: Mapping[str, Any]) -> str:
    """The numbers of a row that tell at a glance how training goes."""
    if "loss" not in row:
        return f"skipped: {row['skipped']}"
    parts = [f"loss {row['loss']:.4f}"]
    if "validation_loss" in row:
        frozen = f" (frozen {row['validation_loss_frozen']:.4f})" if "validation_loss_frozen" in row else ""
        parts.append(f"validation {row['validation_loss']:.4f}{frozen}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    if "peak_memory_bytes" in row:
        parts.append(f"{row['peak_memory_bytes'] / 2**30:.1f} GiB")
    parts.append(f"grad {row['grad_norm']:.3g}")
    if "bad_steps" in row:
        parts.append(f"diverging for {row['bad_steps']}")
    if "inner_grad_norm" in row:
        parts.append(f"inner grad {row['inner_grad_norm']:.3g}, {row['inner_clipped']:.0%} clipped")
    return "  ".join(parts)
