"""A page of an experiment in the making, and how its tables write numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Page:
    """One experiment: its tables and plots, gathered before anything is written."""

    slug: str
    title: str
    questions: str
    parts: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def table(self, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        rows = [list(row) for row in rows]
        if rows:
            lines = [
                " | ".join(head),
                "|".join(["---"] + ["--:"] * (len(head) - 1)),
                *(" | ".join(row) for row in rows),
            ]
            self.parts.append(
                caption + "\n\n" + "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))
            )

    def plot(self, name: str, caption: str, draw: Callable[[Path], None]) -> None:
        self.plots[name] = draw
        self.parts.append(f"![{caption}]({name}.png)")

    def write(self, folder: Path, overwrite: bool) -> None:
        """Plots and results.json; README.md too if there is none, or to begin anew."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in self.plots.items():
            draw(folder / f"{name}.png")
        text = json.dumps(rounded(self.results), indent=1, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        readme = folder / "README.md"
        if overwrite or not readme.exists():
            text = "\n\n".join([f"# {self.title}", self.questions, *self.parts])
            readme.write_text(text + "\n", encoding="utf-8")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def mean(estimate: dict[str, Any] | None) -> str:
    return "–" if not estimate else f"{estimate['mean']:.2f}"


def interval(estimate: dict[str, Any]) -> str:
    return f"{estimate['mean']:.2f} ({estimate['low']:.2f}–{estimate['high']:.2f})"


def signed(estimate: dict[str, Any]) -> str:
    return f"{estimate['mean']:+.3f} ({estimate['low']:+.3f} … {estimate['high']:+.3f})".replace("-", "−")


def rounded(value: Any) -> Any:
    """Numbers to six digits: a file for people too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
