"""Tables and charts as data: what a command shows of its results, wherever it is shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from longread.evaluate.estimate import Estimate

Point: TypeAlias = tuple[float, float]

COLORS = (
    ("#1f5fbf", "#7cb0ff"),
    ("#b45309", "#f5a65b"),
    ("#15803d", "#6fd08c"),
    ("#8b3fb0", "#cf9bea"),
    ("#b4232a", "#ff8a8a"),
    ("#0f766e", "#5cd0c3"),
    ("#b0307f", "#f29ac9"),
    ("#64686f", "#a9aeb6"),
    ("#7d6400", "#d8bf55"),
)
"""Of lines, by their places: blue, orange, green, purple, red, teal, pink, grey, ochre; on light and on dark ground."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of ready cells; each row begins with its name."""

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    best: Sequence[Collection[int]] = ()
    """For each row the columns whose cells are the best of it, where they are compared."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a chart: (x, y) points, and how they are drawn."""

    label: str
    points: Sequence[Point]
    band: Sequence[Point] | None = None
    """An interval (low, high) for each point."""
    color: int = 0
    """A place in `COLORS`."""
    dashed: bool = False
    faint: bool = False
    """One of several behind another, without a name."""
    notes: Sequence[str] | None = None
    """The labels above the bars."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis, or bars; `name` becomes the name of its file."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = True
    bars: bool = False
    """Of each line's points, side by side at x = 0, 1, 2, …, from zero."""
    ticks: Mapping[float, str] = field(default_factory=dict)
    """Names of places on the x axis; found by themselves if there are none."""
    limits: tuple[float | None, float | None] = (None, None)
    """Of the y axis; what is outside of them is drawn at its end. None: of what is drawn."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of one command as it shows them."""

    grids: Sequence[Grid]
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()


def estimate_line(label: str, points: Sequence[tuple[float, Estimate]], color: int, dashed: bool) -> Line:
    """A series of estimates; the band is drawn where every point has an interval."""
    band = [(loss.low, loss.high) for _, loss in points if loss.low is not None and loss.high is not None]
    means = [(x, loss.mean) for x, loss in points]
    return Line(label, means, band if len(band) == len(points) else None, color, dashed)


def share_cell(share: Estimate | None) -> str:
    """A share with its interval, as a cell of a `Grid`."""
    if share is None or share.low is None or share.high is None:
        return "–"
    return f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}]"


def colors(models: Sequence[str]) -> dict[str, int]:
    """A place among `COLORS` for each model, in order of appearance."""
    return {model: i % len(COLORS) for i, model in enumerate(dict.fromkeys(models))}
