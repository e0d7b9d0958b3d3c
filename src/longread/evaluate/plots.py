"""PNG plots for papers and slides (matplotlib, the extra `plots`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from longread.config import UserError
from longread.evaluate.chart import Line, estimate_line
from longread.evaluate.estimate import Estimate
from longread.evaluate.figures import Chart, colors
from longread.evaluate.summary import Evaluation, Result
from longread.extras import install_command


def save_plots(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Writes `loss_by_position.png` and, where documents are long enough, `loss_by_context_length.png`.

    Raises:
        UserError: matplotlib is not installed, or the directory cannot be written.
    """
    return save_charts(evaluation_charts(evaluation), directory)


def evaluation_charts(evaluation: Evaluation) -> list[Chart]:
    """Loss by position and, where documents are long enough, by context length."""
    color, loss = colors([result.model for result in evaluation.results]), evaluation.loss
    by_position, by_length = [], []
    for result in evaluation.results:

        def line(points: Sequence[tuple[float, Estimate]], result: Result = result) -> Line:
            return estimate_line(result.label, points, color[result.model], result.reading == "frozen")

        by_position.append(line([(math.sqrt(max(row.start, 8) * row.end), loss(row.score)) for row in result.curve]))
        by_length.append(line([(row.context_length, loss(row.score)) for row in result.by_context_length]))
    unit, positions = evaluation.unit, evaluation.positions
    charts = [Chart("loss_by_position", "", f"position, {positions}", unit, by_position)]
    if any(line.points for line in by_length):
        charts.append(Chart("loss_by_context_length", "", f"context length T, {positions}", unit, by_length))
    return charts


def check_plots_can_be_drawn() -> None:
    """Raises `UserError` where matplotlib is missing."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError:
        raise UserError(f"plots need matplotlib; run {install_command('plots')}") from None


def save_charts(charts: Sequence[Chart], directory: Path) -> list[Path]:
    """Writes each chart as `<name>.png`. Raises `UserError` as `save_plots` does."""
    check_plots_can_be_drawn()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for chart in charts:
        figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for line in chart.lines:
            xs, style, color = [x for x, _ in line.points], "--" if line.dashed else "-", f"C{line.color}"
            axes.plot(xs, [y for _, y in line.points], label=line.label, marker=".", color=color, linestyle=style)
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        if chart.log_x:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        path = directory / f"{chart.name}.png"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        paths.append(path)
    return paths
