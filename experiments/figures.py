"""Charts of the experiments: a method has its colour on every page, and a variant of it dashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from longread.evaluate import Chart, Line, short

COLORS = {
    "TTT-E2E": 4,
    "SWA": 7,
    "full attention": 0,
    "hybrid 5 : 1": 8,
    "Gated DeltaNet": 2,
    "Mamba 2": 3,
    "TTT-KVB": 1,
    "TTT-naive": 5,
    "first-order": 6,
    "cut every 2 steps": 3,
    "cut every 4 steps": 8,
}
OTHERS = (4, 0, 2, 8, 3, 5, 1, 7)
"""Of lines that are not methods."""
ALIASES = {"exact": "TTT-E2E", "static loss (TTT-naive)": "TTT-naive"}
DASHED = ("frozen", "b = 16", "54 % more tokens", "35 % more tokens", "35M")


def panel(
    title: str,
    lines: Sequence[Line],
    y: str = "",
    x: str = "tokens",
    *,
    log: bool = True,
    zero: str = "",
    ticks: Sequence[float] | Mapping[float, str] = (),
    limits: tuple[float | None, float | None] = (None, None),
) -> Chart:
    """A chart whose lines look as their names say; `zero` is what a line at zero stands for."""
    drawn = [_styled(line, i) for i, line in enumerate(line for line in lines if line.points)]
    xs = [x for line in drawn for x, _ in line.points]
    if zero and xs:
        drawn.append(_styled(Line(zero, [(min(xs), 0.0), (max(xs), 0.0)]), -1))
    named = ticks if isinstance(ticks, Mapping) else {tick: short(tick) for tick in ticks}
    return Chart("", title, x, y, drawn, log, ticks=named, limits=limits)


def _styled(line: Line, place: int) -> Line:
    method, _, variant = line.label.partition(", ")
    color = COLORS.get(ALIASES.get(method, method), OTHERS[place % len(OTHERS)])
    return replace(line, color=color, dashed=variant in DASHED)
