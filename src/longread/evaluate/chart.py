"""Line charts as inline SVG: no dependency, themed by the page's CSS variables, readable without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

from longread.evaluate.estimate import Estimate

LABEL_SPACING = 17
LABEL_CHARACTER = 8.1
"""Width of a character of a label, in units of the drawing."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series: (x, y) points, optional interval (low, high) per point, a palette place and a dash or none."""

    label: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float]] | None = None
    color: int = 0
    dashed: bool = False


def estimate_line(label: str, points: Sequence[tuple[float, Estimate]], color: int, dashed: bool) -> Line:
    """A series of estimates; the band is drawn where every point has an interval."""
    band = [(loss.low, loss.high) for _, loss in points if loss.low is not None and loss.high is not None]
    return Line(
        label, [(x, loss.mean) for x, loss in points], band if len(band) == len(points) else None, color, dashed
    )


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str, log_x: bool = True) -> str:
    """Draws the lines twice, and the page's style shows one: wide, with names at the ends of the lines, or for a narrow
    screen, with a legend below. Every point of the wide one carries its numbers as a tooltip."""
    lines = [finite for line in lines if (finite := _finite(line)).points]
    if not lines:
        return ""
    longest = LABEL_CHARACTER * max(len(line.label) for line in lines)
    wide = _Frame("wide", 860, 360, 56, math.ceil(min(max(longest, 120), 330)) + 16)
    narrow = _Frame("narrow", 360, 260, 50, 14)
    parts = []
    for frame in (wide, narrow):
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points]
        ys += [bound for line in lines for pair in line.band or [] for bound in pair]
        scale = _Scale(frame, min(xs), max(xs), min(ys), max(ys), log_x)
        parts += [
            f'<svg class="chart {frame.name}" viewBox="0 0 {frame.width} {frame.height}" role="img"',
            f'aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            *_axes(scale, x_label, y_label),
            *_drawn(lines, scale),
            *(_end_labels(lines, scale) if frame is wide else []),
            "</svg>",
        ]
    return "\n".join([*parts, _legend(lines)])


def _drawn(lines: Sequence[Line], scale: _Scale) -> list[str]:
    parts = []
    for line in lines:
        if line.band:
            band = [(x, low, high) for (x, _), (low, high) in zip(line.points, line.band, strict=True)]
            upper = [f"{scale.x(x):.1f},{scale.y(high):.1f}" for x, _, high in band]
            lower = [f"{scale.x(x):.1f},{scale.y(low):.1f}" for x, low, _ in band]
            parts.append(f'<polygon class="band c{line.color}" points="{" ".join(upper + lower[::-1])}"/>')
    for line in lines:
        path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line c{line.color}"{_dash(line)} points="{path}"/>')
        if len(line.points) <= 64:
            parts.extend(
                f'<circle class="point c{line.color}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="2.6">'
                f"<title>{escape(line.label)}: {y:.4f} at {x:,.0f}</title></circle>"
                for x, y in line.points
            )
    return parts


def _dash(line: Line) -> str:
    return ' stroke-dasharray="6 5"' if line.dashed else ""


def _legend(lines: Sequence[Line]) -> str:
    items = [
        f'<li><svg viewBox="0 0 30 8"><path class="line c{line.color}"{_dash(line)} d="M1 4H29"/></svg>'
        f"{escape(line.label)}</li>"
        for line in lines
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _finite(line: Line) -> Line:
    """Without the points at infinity, where a reading has diverged."""
    kept = [i for i, (_, y) in enumerate(line.points) if math.isfinite(y)]
    band = None if line.band is None else [line.band[i] for i in kept]
    return replace(line, points=[line.points[i] for i in kept], band=band)


class _Frame(NamedTuple):
    """A drawing and the margins around its axes."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int = 16
    bottom: int = 48

    @property
    def end(self) -> int:
        """Where the x axis ends."""
        return self.width - self.right


class _Scale:
    def __init__(self, frame: _Frame, x_min: float, x_max: float, y_min: float, y_max: float, log_x: bool) -> None:
        self.frame, self.log_x = frame, log_x
        self.x_min, self.x_max = x_min, x_max if x_max > x_min else x_min + 1
        self.y_ticks = nice_ticks(y_min, y_max)
        self.y_min, self.y_max = min(y_min, self.y_ticks[0]), max(y_max, self.y_ticks[-1])
        self._most_x_ticks = (frame.end - frame.left) // 48

    def x(self, value: float) -> float:
        low, high, at = self.x_min, self.x_max, value
        if self.log_x:
            low, high, at = math.log2(low), math.log2(high), math.log2(value)
        return self.frame.left + (at - low) / (high - low) * (self.frame.end - self.frame.left)

    def y(self, value: float) -> float:
        height = self.frame.height - self.frame.top - self.frame.bottom
        return self.frame.top + (self.y_max - value) / (self.y_max - self.y_min) * height

    @property
    def x_ticks(self) -> list[float]:
        if not self.log_x:
            ticks = nice_ticks(self.x_min, self.x_max, min(6, self._most_x_ticks))
            return [tick for tick in ticks if self.x_min <= tick <= self.x_max]
        first, last = math.ceil(math.log2(self.x_min)), math.floor(math.log2(self.x_max))
        step = max(1, math.ceil((last + 1 - first) / self._most_x_ticks))
        return [2.0**power for power in range(first, last + 1, step)]


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / target))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= target)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _axes(scale: _Scale, x_label: str, y_label: str) -> list[str]:
    frame = scale.frame
    left, right, bottom = frame.left, frame.end, frame.height - frame.bottom
    parts = []
    for tick in scale.y_ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in scale.x_ticks:
        x = scale.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{_short(tick)}</text>')
    center, middle = (left + right) / 2, (frame.top + bottom) / 2
    place = f'x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})"'
    return [
        *parts,
        f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<text class="name" x="{center}" y="{frame.height - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="name" {place}>{escape(y_label)}</text>',
    ]


def _short(value: float) -> str:
    if value >= 2**20 and value % 2**20 == 0:
        return f"{value / 2**20:g}M"
    return f"{value / 1024:g}K" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _end_labels(lines: Sequence[Line], scale: _Scale) -> list[str]:
    """Labels beside the last points, moved apart where they would overlap."""
    frame = scale.frame
    ends = sorted((scale.y(line.points[-1][1]), i) for i, line in enumerate(lines))
    parts, floor = [], -math.inf
    lift = max(0.0, ends[0][0] + LABEL_SPACING * (len(ends) - 1) - (frame.height - frame.bottom))
    for y, i in ends:
        floor = max(y - lift, floor + LABEL_SPACING)
        line = lines[i]
        x = scale.x(line.points[-1][0])
        parts.append(
            f'<text class="label c{line.color}" x="{max(x, frame.end) + 8:.1f}" y="{floor + 4:.1f}">'
            f"{escape(_shortened(line.label, int((frame.right - 16) / LABEL_CHARACTER)))}</text>"
        )
        if x < frame.end - 1:
            parts.append(
                f'<line class="leader c{line.color}" x1="{x + 4:.1f}" x2="{frame.end + 4}" '
                f'y1="{y:.1f}" y2="{floor:.1f}"/>'
            )
    return parts


def _shortened(label: str, most: int) -> str:
    """Without its middle, if it is longer than `most` characters: names of runs begin and end differently."""
    kept = (most - 1) // 2
    return label if len(label) <= most else f"{label[: most - 1 - kept]}…{label[-kept:]}"
