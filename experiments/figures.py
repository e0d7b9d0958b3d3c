"""Plots of the experiments: PNG on a transparent ground, readable in light and dark, lines labelled where they end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.results import short

INK = "#808080"
COLORS = {
    "TTT-E2E": "#d6455a",
    "SWA": "#8a8a8a",
    "full attention": "#2f86d1",
    "hybrid 5 : 1": "#c08a16",
    "Gated DeltaNet": "#2f9e62",
    "Mamba 2": "#9a6bd0",
    "TTT-KVB": "#c2703a",
    "TTT-naive": "#1f9aa5",
    "first-order": "#d65fb0",
    "cut every 2 steps": "#9a6bd0",
    "cut every 4 steps": "#c08a16",
}
OTHERS = ("#d6455a", "#2f86d1", "#2f9e62", "#c08a16", "#9a6bd0", "#1f9aa5", "#c2703a", "#8a8a8a")
"""Of lines that are not methods."""
LONGEST_NAME = 0.3
"""As a share of a panel's width."""
ALIASES = {"exact": "TTT-E2E", "static loss (TTT-naive)": "TTT-naive"}
DASHES = {
    "frozen": (0, (4, 2)),
    "b = 16": (0, (1, 1.5)),
    "54 % more tokens": (0, (4, 2)),
    "35 % more tokens": (0, (4, 2)),
}


@dataclass
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """Range over seeds at each point, where there are several."""
    faint: bool = False
    """One of several behind another, without a name."""


@dataclass
class Panel:
    title: str
    lines: list[Line]
    y: str = ""
    x: str = "tokens"
    log: bool = True
    markers: bool = False
    zero: str = ""
    """What a line at zero stands for."""
    ticks: Sequence[float] = ()
    limits: tuple[float, float] | None = None
    names: dict[float, str] = field(default_factory=dict)
    """Of the ticks."""


def plot(*panels: Panel, width: float = 9.0, height: float = 3.9, labels: float = 0.34) -> Callable[[Path], None]:
    """Draws panels side by side; `labels`: room to the right of each, as a share of its width."""

    def draw(path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            fill(axes, panel, labels)
        figure.savefig(path, transparent=True, pil_kwargs={"optimize": True})

    return draw


def fill(axes: Any, panel: Panel, labels: float) -> None:
    ends = []
    for i, line in enumerate(line for line in panel.lines if line.points):
        base, _, variant = line.name.partition(", ")
        color = color_of(base, OTHERS[i % len(OTHERS)])
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        dots = {"marker": "o", "markersize": 4} if panel.markers or len(xs) == 1 else {}
        if line.faint:
            axes.plot(xs, ys, color=color, linewidth=1.0, alpha=0.45)
            continue
        axes.plot(xs, ys, color=color, linewidth=2.0, linestyle=DASHES.get(variant, "-"), **dots)
        if line.low:
            axes.fill_between(xs, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        ends.append((ys[-1], xs[-1], line.name, color))
    if panel.zero and ends:
        xs = [x for line in panel.lines for x, _ in line.points]
        color = color_of(panel.zero, COLORS["SWA"])
        axes.plot([min(xs), max(xs)], [0.0, 0.0], color=color, linewidth=1.4)
        ends.append((0.0, max(xs), panel.zero, color))
    if panel.log:
        axes.set_xscale("log", base=2)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    style(axes, panel)
    room(axes, labels, panel.log)
    label(axes, ends)


def color_of(name: str, other: str) -> str:
    return COLORS.get(ALIASES.get(name, name), other)


def style(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, color=INK, fontsize=10.5, loc="left")
    axes.set_xlabel(panel.x, color=INK)
    axes.set_ylabel(panel.y, color=INK)
    if panel.ticks:
        axes.set_xticks(panel.ticks, [panel.names.get(x, short(x)) for x in panel.ticks])
        axes.minorticks_off()
    elif panel.log:
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.tick_params(colors=INK, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.grid(color=INK, alpha=0.2)


def room(axes: Any, share: float, log: bool) -> None:
    """Widens the x axis to the right, where names go."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** share if log else high + (high - low) * share)


def label(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the ends of lines; those that would cover each other are moved apart."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ends = sorted(ends)
    places = [y for y, *_ in ends]
    across = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0] for y, x, *_ in ends]
    for _ in range(300):
        places = [min(max(y, low + gap / 2), high - gap / 2) for y in places]
        for i, j in itertools.combinations(range(len(ends)), 2):
            overlap = gap - (places[j] - places[i])
            if overlap > 1e-9 and abs(across[i] - across[j]) < LONGEST_NAME:
                places[i] -= overlap / 2
                places[j] += overlap / 2
    for place, (_, x, name, color) in zip(places, ends, strict=True):
        at = {"xytext": (7, 0), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(name, (x, place), color=color, va="center", fontsize=8.5, **at)
