"""The rows as charts for a README, a panel for each size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longread.bench.cases import METHODS, SIZE_NAMES
from longread.bench.report import NAMES
from longread.bench.rows import Row
from longread.evaluate import Chart, Line, draw, short, to_svg
from longread.files import atomic_files

PLOTS = {
    "prefill": ("prefill_ms_per_1k", "ms per 1K tokens read"),
    "training": ("train_tokens_per_s", "tokens per second of training"),
    "decoding": ("decode_tokens_per_s", "tokens per second written"),
    "first-read": ("first_read_s", "seconds"),
    "first-token": ("first_token_s", "seconds"),
}
"""Name of the file: the measure, and its unit for a reader."""
_COLORS = {"e2e": 4, "swa": 2, "full": 0}


def save_bench_plots(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Writes an SVG file for each of `PLOTS` of which there are rows, whole or not at all."""
    paths = []
    for name in PLOTS:
        if charts := bench_charts(rows, name):
            path = directory / f"{name}.svg"
            drawing = draw(charts, width=max(520, 370 * len(charts)), height=300, titles=True, names="above")
            with atomic_files(path) as (temporary,):
                temporary.write_text(to_svg(drawing, alone=True), encoding="utf-8")
            paths.append(path)
    return paths


def bench_charts(rows: Sequence[Row], name: str) -> list[Chart]:
    """One of `PLOTS`, a chart for each size: lines over the context, or bars for contexts and numbers of sequences, or
    for what a fresh process does first."""
    measure, unit = PLOTS[name]
    chosen = [row for row in rows if row["measure"] == measure]
    charts: list[Chart] = []
    for size in sorted({row["size"] for row in chosen}, key=lambda size: ((*SIZE_NAMES, size).index(size), size)):
        of_size = [row for row in chosen if row["size"] == size]
        title, y_label = size.upper() if size[0].isdigit() else size, "" if charts else unit
        if name == "training":
            charts.append(_bars(of_size, title, y_label))
        elif name.startswith("first"):
            charts.append(_parts(name, of_size, title, y_label))
        else:
            lines = [_line(method, points) for method in METHODS if (points := _points(of_size, method))]
            charts.append(Chart(name, title, "tokens of context", y_label, lines, limits=(0.0, None)))
    return charts


def _points(rows: Sequence[Row], method: str) -> list[tuple[float, float]]:
    return sorted((row["context"], row["value"]) for row in rows if row["method"] == method)


def _line(method: str, points: Sequence[tuple[float, float]], notes: Sequence[str] | None = None) -> Line:
    return Line(NAMES[method], points, color=_COLORS[method], dashed=method == "swa", notes=notes)


def _bars(rows: Sequence[Row], title: str, y_label: str) -> Chart:
    groups = sorted({(row["context"], row["sequences"]) for row in rows})
    ticks = {float(i): f"{short(context)} × {sequences}" for i, (context, sequences) in enumerate(groups)}
    lines = []
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        points = [(float(groups.index((row["context"], row["sequences"]))), row["value"]) for row in of_method]
        notes = [_thousands(row["value"]) + "*" * computes_again(row) for row in of_method]
        lines += [_line(method, points, notes)] if points else []
    x_label = "context × sequences; * computes again" if any(map(computes_again, rows)) else "context × sequences"
    return Chart("training", title, x_label, y_label, lines, log_x=False, bars=True, ticks=ticks)


def _parts(name: str, rows: Sequence[Row], title: str, y_label: str) -> Chart:
    """Of the shortest context."""
    context = min(row["context"] for row in rows)
    found = {row["method"]: list(row["parts"].values()) for row in rows if row["context"] == context}
    lines = [
        _line(method, [(float(i), s) for i, s in enumerate(found[method])], [f"{s:.3g}" for s in found[method]])
        for method in METHODS
        if method in found
    ]
    ticks = {float(i): part for i, part in enumerate(rows[0]["parts"])}
    x_label = f"{short(context)} tokens"
    return Chart(name, title, x_label, y_label, lines, log_x=False, bars=True, ticks=ticks)


def computes_again(row: Row) -> bool:
    """Whether a training step computes some activations twice, for want of memory."""
    return bool(row.get("recompute", "none") != "none")


def _thousands(value: float) -> str:
    return f"{value / 1e3:.3g}K" if value >= 1000 else f"{value:.3g}"
