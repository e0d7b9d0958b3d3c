"""The health of the inner loop as tables and charts."""

from __future__ import annotations

import math

from longread.evaluate.figures import Chart, Figures, Grid, Line, colors, estimate_line
from longread.evaluate.health import Health, StepsBin
from longread.evaluate.summary import Evaluation


def health_figures(evaluation: Evaluation) -> Figures:
    """Gradient norm, clipped share and drift along the text, a column for each learning model; the divergences.

    Steps are taken every so many tokens, so positions are tokens here, each model's own where tokenizers differ.
    """
    tokens = "tokens of each model's own" if evaluation.by_byte else "tokens"
    color = colors([result.model for result in evaluation.results])
    learning = [(result.model, result.health) for result in evaluation.results if result.health]
    lost = [(r.label, found) for r in evaluation.results for found in r.diverged]
    grids = [_steps_grid(learning, tokens), _drift_grid(learning, tokens)] if learning else []
    if lost:
        rows = [
            (d.document, [label, f"{d.position:,}", "–" if d.gradient_norm is None else f"{d.gradient_norm:.3g}"])
            for label, d in lost
        ]
        columns = ["model, reading", "finite until token", "newest gradient norm"]
        grids.append(Grid("Readings that are no longer finite", "document", columns, rows))
    norms = [
        Line(name, [(math.sqrt(b.start * b.end), b.mean_gradient_norm) for b in found.by_position], color=color[name])
        for name, found in learning
    ]
    drift = [estimate_line(name, found.drift_by_position, color[name], False) for name, found in learning]
    charts = [
        Chart("inner_gradient_norm", "Gradient norm of inner steps", f"position, {tokens}", "mean norm", norms),
        Chart(
            "drift",
            "Drift of the fast weights",
            f"{tokens} read" if not evaluation.by_byte else f"read, {tokens}",
            "‖W − W₀‖ / ‖W₀‖",
            drift,
        ),
    ]
    return Figures(grids, [chart for chart in charts if any(line.points for line in chart.lines)])


def _steps_grid(learning: list[tuple[str, Health]], tokens: str) -> Grid:
    columns = [{b.start: b for b in found.by_position} for _, found in learning]
    rows = [
        (f"{start:,}–{2 * start:,}", [_steps_cell(column.get(start)) for column in columns])
        for start in sorted({start for column in columns for start in column})
    ]
    title = "Inner steps by position: mean gradient norm, largest, share clipped"
    return Grid(title, tokens, [name for name, _ in learning], rows)


def _steps_cell(found: StepsBin | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean_gradient_norm:.3f}, {found.largest_gradient_norm:.3f}, {100 * found.clipped_share:.0f} %"


def _drift_grid(learning: list[tuple[str, Health]], tokens: str) -> Grid:
    columns = [dict(found.drift_by_position) for _, found in learning]
    positions = sorted({position for column in columns for position in column})
    shown = [p for p in positions if p & (p - 1) == 0] or positions[-1:]
    rows = [(f"{p:,}", [str(column.get(p) or "–") for column in columns]) for p in shown]
    return Grid("Drift of the fast weights, ‖W − W₀‖ / ‖W₀‖", tokens, [name for name, _ in learning], rows)
