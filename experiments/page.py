"""Pages of experiments: tables made of results.json, plots, and how tables write numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longread.evaluate import Chart, draw, markdown_table, to_svg

Data = Mapping[str, Any]
"""What a results.json holds."""


@dataclass(frozen=True)
class Table:
    """A table below its caption, by which it is found again in a page."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def text(self) -> str:
        return self.caption + "\n\n" + markdown_table(self.head, self.rows)


class Plot(NamedTuple):
    """An SVG: its name, what it shows, and the charts in it, two in a row."""

    name: str
    caption: str
    charts: Sequence[Chart]


def write(folder: Path, heading: str, results: Data, tables: Iterable[Table], plots: Iterable[Plot]) -> None:
    """results.json, plots and README.md: a new page begins with `heading`, of one that is there the tables change.

    What that one has no place for, a table, follows the one before it; a plot must be shown by hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = [heading, *(table.text for table in tables)]
    for plot in plots:
        drawing = draw(plot.charts, width=860 if len(plot.charts) == 1 else 1240, columns=2, titles=True)
        (folder / f"{plot.name}.svg").write_text(to_svg(drawing, alone=True), encoding="utf-8")
        parts.append(f"![{plot.caption}]({plot.name}.svg)")
    readme = folder / "README.md"
    text = with_tables(readme, tables, add=True) if readme.exists() else "\n\n".join(parts) + "\n"
    readme.write_text(text, encoding="utf-8")


def with_tables(readme: Path, tables: Iterable[Table], *, add: bool = False) -> str:
    """The text of a page with each of `tables` in the place of the one below the same caption.

    One that is not there is an error, or with `add` follows the table before it.
    """
    text, place = readme.read_text(encoding="utf-8"), None
    for table in tables:
        before, found, after = text.partition(f"\n{table.caption}\n\n|")
        if found:
            _, gap, rest = after.partition("\n\n")
            before += "\n"
        elif add and place is not None:
            before, rest = text[:place].rstrip("\n") + "\n\n", text[place:].lstrip("\n")
            gap = "\n\n" if rest else ""
        else:
            raise SystemExit(f"{readme} has no table below {table.caption!r}; write that line and a first row there")
        place = len(before) + len(table.text)
        text = before + table.text + (gap or "\n") + rest
    return text


def as_stored(results: Any) -> Any:
    """What comes back from results.json: numbers to six digits, keys as text."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value

    return json.loads(json.dumps(rounded(results)))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def mean(estimate: dict[str, Any] | None) -> str:
    return "–" if not estimate else f"{estimate['mean']:.2f}"


def interval(estimate: dict[str, Any]) -> str:
    return f"{estimate['mean']:.2f} ({estimate['low']:.2f}–{estimate['high']:.2f})"


def signed(estimate: dict[str, Any]) -> str:
    return f"{estimate['mean']:+.3f} ({estimate['low']:+.3f} … {estimate['high']:+.3f})".replace("-", "−")
