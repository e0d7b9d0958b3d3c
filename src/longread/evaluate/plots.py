"""PNG plots for papers and slides (matplotlib, the extra `plots`)."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.evaluate.summary import Evaluation


def save_plots(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Writes `loss_by_position.png` and, where documents are long enough, `loss_by_context_length.png`.

    Raises:
        UserError: matplotlib is not installed, or the directory cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('plots need matplotlib; install it with: pip install "longread[plots]"') from None

    def draw(name: str, x_label: str, series: list[tuple[str, bool, int, list[Any]]]) -> Path:
        figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for label, dashed, color, rows in series:
            xs = [x for x, _ in rows]
            line = "--" if dashed else "-"
            axes.plot(xs, [loss.mean for _, loss in rows], label=label, marker=".", color=f"C{color}", linestyle=line)
            if all(loss.low is not None for _, loss in rows):
                low, high = [loss.low for _, loss in rows], [loss.high for _, loss in rows]
                axes.fill_between(xs, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set(xlabel=x_label, ylabel="nats per token")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        path = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        return path

    models = list(dict.fromkeys(result.model for result in evaluation.results))
    by_position, by_length = [], []
    for result in evaluation.results:
        style = (result.label, result.reading == "frozen", models.index(result.model))
        curve = [(sqrt(max(row.start, 8) * row.end), row.score.nats_per_token) for row in result.curve]
        by_position.append((*style, curve))
        by_length.append((*style, [(row.context_length, row.score.nats_per_token) for row in result.by_context_length]))
    paths = [draw("loss_by_position.png", "position, tokens", by_position)]
    if any(rows for *_, rows in by_length):
        paths.append(draw("loss_by_context_length.png", "context length T, tokens", by_length))
    return paths
