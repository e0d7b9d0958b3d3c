"""Drawings as PNG for papers and slides (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.evaluate.drawing import BOLD, FILLS, PALETTE, SIZES, STROKES, Drawing, Mark, Words, draw
from longread.evaluate.figures import Chart
from longread.extras import install_command
from longread.files import atomic_files

_DOTS = 100
"""Pixels of a drawing per inch of the figure; twice as many in the file."""
_POINT = 72 / _DOTS
_MARKERS = {"circle": ("o", 7.2), "square": ("s", 7.2), "triangle": ("^", 10.0), "dot": ("o", 4.8)}


def check_plots_can_be_drawn() -> None:
    """Raises `UserError` where matplotlib is missing."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError:
        raise UserError(f"plots need matplotlib; run {install_command('plots')}") from None


def save_charts(charts: Sequence[Chart], directory: Path) -> list[Path]:
    """Writes each chart as `<name>.png`.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    check_plots_can_be_drawn()
    paths = [directory / f"{chart.name}.png" for chart in charts]
    for chart, path in zip(charts, paths, strict=True):
        with atomic_files(path) as (temporary,):
            _save(draw([chart]), temporary)
    return paths


def _save(drawing: Drawing, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawing.width / _DOTS, drawing.height / _DOTS), dpi=2 * _DOTS)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_axis_off()
    for part in drawing.parts:
        color = PALETTE[part.color][0]
        if isinstance(part, Words):
            anchor, turned = {"start": "left", "middle": "center", "end": "right"}[part.anchor], 90 * part.upright
            size, weight = SIZES[part.kind] * _POINT, "bold" if part.kind in BOLD else "normal"
            style: dict[str, Any] = {
                "fontsize": size,
                "weight": weight,
                "ha": anchor,
                "va": "baseline",
                "rotation": turned,
            }
            axes.text(*part.at, part.text, color=color, parse_math=False, rotation_mode="anchor", **style)
        elif isinstance(part, Mark):
            marker, size = _MARKERS[part.form]
            axes.plot(*part.at, marker=marker, markersize=size * _POINT, markeredgewidth=0, color=color)
        elif part.kind in FILLS:
            axes.fill(*zip(*part.points, strict=True), color=color, alpha=FILLS[part.kind], linewidth=0)
        else:
            width, opacity = STROKES[part.kind]
            dash = (0, [length / width for length in part.dash]) if part.dash else "-"
            xs, ys = zip(*part.points, strict=True)
            axes.plot(xs, ys, color=color, linewidth=width * _POINT, alpha=opacity, linestyle=dash)
    figure.savefig(path, format="png")
