"""Charts as drawings: the lines, marks and words of a picture, in pixels. `svg.py` and `plots.py` write them.

A line is told from the others by its name, its dashes and the form of its marks, not by its colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from longread.evaluate.figures import COLORS, Chart, Line, Point

PALETTE = {"ink": ("#1d2129", "#e8e6e1"), "soft": ("#5b6472", "#a0a8b5"), "rule": ("#e3e1da", "#343943")}
PALETTE |= {f"c{place}": pair for place, pair in enumerate(COLORS)}
"""Each colour by its name, on light and on dark ground."""
STROKES = {"grid": (1.0, 1.0), "axis": (1.0, 1.0), "line": (2.4, 1.0), "faint": (1.0, 0.45), "leader": (1.0, 0.8)}
"""Width and opacity of an open path."""
FILLS = {"band": 0.14, "bar": 1.0}
"""Opacity of a closed path."""
SIZES = {"tick": 12, "name": 13, "title": 13, "label": 13, "note": 9}
"""Of words; titles and labels are bold."""
BOLD = ("title", "label")
CHARACTER = 8.1
"""Width of a character of a label at the most, on average over a name."""
LABEL_SPACING, TICK_SPACING = 17, 44
MOST_MARKS, MOST_DOTS = 20, 64
"""Points of a line that each have a mark, or at least a dot."""
Names = Literal["beside", "above", "apart"]


class Stroke(NamedTuple):
    """A path, or a closed and filled one if its kind is among `FILLS`."""

    points: Sequence[Point]
    kind: str
    color: str
    dash: tuple[float, ...] = ()
    tip: str = ""


class Mark(NamedTuple):
    """A point: a circle, a square or a triangle, or a dot."""

    at: Point
    form: Literal["circle", "square", "triangle", "dot"]
    color: str
    tip: str = ""


class Words(NamedTuple):
    """A line of text that starts at, ends at or has its middle at a point."""

    text: str
    at: Point
    kind: str
    color: str = "soft"
    anchor: Literal["start", "middle", "end"] = "start"
    upright: bool = False
    """Turned by 90 degrees, to be read from below."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of `width` × `height` pixels; y grows downwards, and later parts cover earlier ones."""

    width: int
    height: int
    title: str
    parts: Sequence[Stroke | Mark | Words]


def draw(
    charts: Sequence[Chart],
    *,
    width: int = 860,
    height: int = 360,
    columns: int = 3,
    titles: bool = False,
    names: Names = "beside",
) -> Drawing:
    """Draws charts side by side, at most `columns` in a row.

    Args:
        width: of the whole drawing.
        height: of each row.
        titles: whether each chart has its title above it.
        names: of the lines: beside their ends, in one row above all charts, or apart, for the page to write. Bars have
            no ends to write them at.
    """
    parts: list[Stroke | Mark | Words] = [*(_legend(charts) if names == "above" else ())]
    above, columns = 24 if names == "above" else 0, max(1, min(columns, len(charts)))
    for place, chart in enumerate(map(finite, charts)):
        row, column = divmod(place, columns)
        left, end = (width * (column + i) // columns for i in (0, 1))
        top, room = above + row * height, 20.0
        if names == "beside":
            longest = CHARACTER * max((len(line.label) for line in chart.lines), default=0)
            room = min(max(longest, 0.14 * (end - left)), 0.385 * (end - left)) + 16
        panel = _Panel(chart, left, math.floor(end - room), top + (34 if titles else 16), top + height - 48)
        if titles:
            parts.append(Words(chart.title, (panel.left, panel.top - 14), "title", "ink"))
        parts += [*_axes(panel), *(_bars(panel) if chart.bars else _lines(panel))]
        parts += _end_labels(panel, end) if names == "beside" else ()
    title = "; ".join(filter(None, (chart.title for chart in charts)))
    return Drawing(width, above + height * -(-len(charts) // columns), title, parts)


def finite(chart: Chart) -> Chart:
    """Without the points at infinity, where a reading has diverged, and the lines of which nothing is left."""
    lines: list[Line] = []
    for line in chart.lines:
        kept = [i for i, (_, y) in enumerate(line.points) if math.isfinite(y)]
        band, notes = line.band and [line.band[i] for i in kept], line.notes and [line.notes[i] for i in kept]
        lines += [replace(line, points=[line.points[i] for i in kept], band=band, notes=notes)] if kept else []
    return replace(chart, lines=lines)


def sample(line: Line, x: float, y: float) -> list[Stroke | Mark | Words]:
    """How a line is drawn, 28 pixels of it, for a legend."""
    color = f"c{line.color}"
    return [Stroke([(x, y), (x + 28, y)], "line", color, _dash(line)), Mark((x + 14, y), _form(line), color)]


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / target))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= target)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def short(count: float) -> str:
    """8192 is 8K, and 2^20 is 1M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count / unit:g}{name}"
    return f"{count:g}"


class _Panel:
    """One chart's axes: from values to pixels."""

    def __init__(self, chart: Chart, left: int, right: int, top: int, bottom: int) -> None:
        self.chart, self.edge, self.right, self.top, self.bottom = chart, left, right, top, bottom
        self.xs = sorted({x for line in chart.lines for x, _ in line.points}) or [1.0]
        margin = 0.5 if chart.bars else 0.0
        self.first, self.last = self.xs[0] - margin, max(self.xs[-1], self.xs[0] + 1 - 2 * margin) + margin
        values = [y for line in chart.lines for _, y in line.points] + [0.0] * chart.bars
        values += [bound for line in chart.lines for pair in line.band or () for bound in pair]
        found = min(values, default=0.0), max(values, default=1.0)
        lowest, highest = (end if limit is None else limit for limit, end in zip(chart.limits, found, strict=True))
        if lowest >= highest:
            lowest, highest = lowest - (abs(lowest) or 1) / 10, lowest + (abs(lowest) or 1) / 10
        ticks = nice_ticks(lowest, highest)
        self.lowest = min(lowest, ticks[0]) if chart.limits[0] is None else lowest
        self.highest = max(highest, ticks[-1]) if chart.limits[1] is None else highest
        self.levels = {tick: _amount(tick, ticks[-1]) for tick in ticks if self.lowest <= tick <= self.highest}
        self.left = left + max(56, math.ceil(7.2 * max(map(len, self.levels.values()), default=0)) + 30)

    def x(self, value: float) -> float:
        low, high = self.first, self.last
        if self.chart.log_x:
            low, high, value = math.log2(low), math.log2(high), math.log2(value)
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        inside = min(max(value, self.lowest), self.highest)
        return self.top + (self.highest - inside) / (self.highest - self.lowest) * (self.bottom - self.top)

    def at(self, point: Point) -> Point:
        return self.x(point[0]), self.y(point[1])

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Of the x axis: those of the chart, or the values if they are few and a line has all of them, or round ones.

        Those that have no room are left out.
        """
        if self.chart.ticks:
            wanted = dict(self.chart.ticks)
        elif len(self.xs) <= 8 and any(len(line.points) == len(self.xs) for line in self.chart.lines):
            wanted = {x: short(x) for x in self.xs}
        elif self.chart.log_x:
            powers = range(math.ceil(math.log2(self.first)), math.floor(math.log2(self.last)) + 1)
            step = max(1, math.ceil(len(powers) * TICK_SPACING / (self.right - self.left)))
            wanted = {2.0**power: short(2.0**power) for power in powers[::step]}
        else:
            target = max(2, min(6, (self.right - self.left) // TICK_SPACING))
            wanted = {tick: short(tick) for tick in nice_ticks(self.first, self.last, target)}
        end = -math.inf
        for tick, name in sorted(wanted.items()):
            half = 3.5 * len(name) + 3
            if self.first <= tick <= self.last and self.x(tick) - half > end:
                yield tick, name
                end = self.x(tick) + half


def _axes(panel: _Panel) -> Iterator[Stroke | Words]:
    left, right, bottom = panel.left, panel.right, panel.bottom
    for level, name in panel.levels.items():
        y = panel.y(level)
        yield Stroke([(left, y), (right, y)], "grid", "rule")
        yield Words(name, (left - 8, y + 4), "tick", anchor="end")
    for tick, name in panel.ticks():
        x = panel.x(tick)
        if not panel.chart.bars:
            yield Stroke([(x, bottom), (x, bottom + 5)], "axis", "soft")
        yield Words(name, (x, bottom + 19), "tick", anchor="middle")
    yield Stroke([(left, bottom), (right, bottom)], "axis", "soft")
    yield Words(panel.chart.x_label, ((left + right) / 2, bottom + 40), "name", anchor="middle")
    yield Words(panel.chart.y_label, (panel.edge + 12, (panel.top + bottom) / 2), "name", anchor="middle", upright=True)


def _amount(level: float, highest: float) -> str:
    name = f"{level / 1000:g}K" if level and highest >= 10000 else f"{level:g}"
    return name.replace("-", "−")


def _lines(panel: _Panel) -> Iterator[Stroke | Mark | Words]:
    for line in panel.chart.lines:
        if line.band:
            band = [(x, low, high) for (x, _), (low, high) in zip(line.points, line.band, strict=True)]
            there, back = ([panel.at((x, bound[i])) for x, *bound in band] for i in (1, 0))
            yield Stroke([*there, *back[::-1]], "band", f"c{line.color}")
    for line in panel.chart.lines:
        at, color = [panel.at(point) for point in line.points], f"c{line.color}"
        yield Stroke(at, "faint" if line.faint else "line", color, _dash(line))
        if len(at) <= MOST_DOTS and not line.faint:
            form = _form(line) if len(at) <= MOST_MARKS else "dot"
            tips = [_tip(panel.chart, line, point) for point in line.points]
            yield from (Mark(place, form, color, tip) for place, tip in zip(at, tips, strict=True))


def _bars(panel: _Panel) -> Iterator[Stroke | Words]:
    """Beside each other at every x, each with its note above it."""
    lines = panel.chart.lines
    wide = min(40.0, (panel.x(1) - panel.x(0)) * 0.84 / max(1, len(lines)))
    for i, line in enumerate(lines):
        for point, note in zip(line.points, line.notes or [""] * len(line.points), strict=True):
            x, y = panel.at(point)
            left, right, zero = x + wide * (i - len(lines) / 2) + 1, x + wide * (i + 1 - len(lines) / 2) - 1, panel.y(0)
            box = [(left, zero), (left, y), (right, y), (right, zero)]
            yield Stroke(box, "bar", f"c{line.color}", tip=_tip(panel.chart, line, point))
            yield Words(note, ((left + right) / 2, min(y, zero) - 4), "note", anchor="middle")


def _tip(chart: Chart, line: Line, point: Point) -> str:
    x, y = point
    place = chart.ticks.get(x) or (f"{x:,.0f}" if x >= 100 else f"{x:g}")
    return f"{line.label}: {y:.4f} at {place}" if abs(y) < 1000 else f"{line.label}: {y:,.0f} at {place}"


def _form(line: Line) -> Literal["circle", "square", "triangle"]:
    forms: tuple[Literal["circle", "square", "triangle"], ...] = ("circle", "square", "triangle")
    return forms[line.color % len(forms)]


def _dash(line: Line) -> tuple[float, ...]:
    return (6, 5) if line.dashed else ()


def _legend(charts: Sequence[Chart]) -> Iterator[Stroke | Mark | Words]:
    x = 12.0
    for line in {line.label: line for chart in charts for line in chart.lines if not line.faint}.values():
        yield from [Mark((x + 15, 17), "square", f"c{line.color}")] if charts[0].bars else sample(line, x, 17)
        yield Words(line.label, (x + 38, 21), "label", f"c{line.color}")
        x += 38 + CHARACTER * len(line.label) + 16


def _end_labels(panel: _Panel, end: int) -> Iterator[Stroke | Words]:
    """Names beside the last points, moved apart where they would overlap."""
    lines = [line for line in panel.chart.lines if not line.faint]
    ends = sorted((panel.y(line.points[-1][1]), i) for i, line in enumerate(lines))
    most = int((end - panel.right - 16) / CHARACTER)
    floor = -math.inf
    lift = max(0.0, ends[0][0] + LABEL_SPACING * (len(ends) - 1) - panel.bottom) if ends else 0.0
    for y, i in ends:
        floor = max(y - lift, floor + LABEL_SPACING)
        x, color = panel.x(lines[i].points[-1][0]), f"c{lines[i].color}"
        yield Words(_shortened(lines[i].label, most), (panel.right + 10, floor + 4), "label", color)
        if x < panel.right - 1 or abs(floor - y) > LABEL_SPACING / 2:
            yield Stroke([(x + 5, y), (panel.right + 7, floor)], "leader", color, (1, 4))


def _shortened(label: str, most: int) -> str:
    """Without its middle, if it is longer than `most` characters: names of runs begin and end differently."""
    kept = (most - 1) // 2
    return label if len(label) <= most else f"{label[: most - 1 - kept]}…{label[-kept:]}"
