"""Training of a thinking agent as people watch it: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from longread.thinking import ThinkingConfig

_SECONDS_BETWEEN_LINES = 10.0
_RECENT = 0.95
"""Of what a shown mean keeps at each step: single steps are noisy."""


class ThinkingProgress:
    """Give it to `train` as `on_step` inside a `with`."""

    def __init__(self, config: ThinkingConfig, console: Console) -> None:
        self._total = config.world_model.steps + config.iterations
        self._console, self._bar = console, None
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._means: dict[str, float] = {}
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=self._total, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, SystemExit):
                self._bar.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Shows one row of metrics.jsonl."""
        for name in ("loss", "pre", "post"):
            if name in row:
                self._means[name] = _RECENT * self._means.get(name, row[name]) + (1 - _RECENT) * row[name]
        said = f"loss {self._means['loss']:.4f}"
        if "post" in row:
            said = f"acts at once {self._means['pre']:.2f}, thinks first {self._means['post']:.2f}"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=row["part"], numbers=said)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or row["step"] == self._total:
            self._last_line = now
            self._console.print(f"step {row['step']}/{self._total}  {row['part']}: {said}")
