"""The figures of an evaluation as plain-text tables."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from longread.evaluate.figures import Figures, Grid, print_figures
from longread.evaluate.summary import Evaluation, PositionScore, Result, Score


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Prints the overview, loss by position and, where documents are long enough, loss by context length."""
    grids = [_overview(evaluation), _by_position(evaluation, lambda result: result.by_position, "Loss by position")]
    if any(result.by_context_length for result in evaluation.results):
        grids.append(_by_context_length(evaluation))
    if any(result.at_index for result in evaluation.results):
        grids.append(_by_position(evaluation, lambda result: result.at_index, "Loss at chosen positions"))
    print_figures(Figures(grids, notes=evaluation.notes), console)


def _by_position(evaluation: Evaluation, rows: Callable[[Result], list[PositionScore]], title: str) -> Grid:
    """A column per result, a row per position bin."""
    unit, cell = _unit_of(evaluation)
    columns = [{(row.start, row.end): row.score for row in rows(result)} for result in evaluation.results]
    return Grid(
        f"{title}, {unit}",
        "bytes" if evaluation.by_byte else "positions",
        [result.label for result in evaluation.results],
        [
            (
                f"{start:,}" if end == start + 1 else f"{start:,}–{end:,}",
                [cell(column.get((start, end))) for column in columns],
            )
            for start, end in sorted({place for column in columns for place in column})
        ],
    )


def _unit_of(evaluation: Evaluation) -> tuple[str, Callable[[Score | None], str]]:
    """Bits per byte where tokenizers differ, nats per token where bytes are unknown; both units otherwise."""
    if evaluation.by_byte:
        return evaluation.unit, lambda score: str(evaluation.loss(score)) if score else "–"
    if evaluation.bytes is None or not any(result.loss.bits_per_byte for result in evaluation.results):
        return "nats per token", lambda score: str(score.nats_per_token) if score else "–"

    def both(score: Score | None) -> str:
        if not score:
            return "–"
        return f"{score.nats_per_token}" + (f" | {score.bits_per_byte.mean:.3f}" if score.bits_per_byte else "")

    return "nats per token | bits per byte", both


def _overview(evaluation: Evaluation) -> Grid:
    interval = "; ± is a 95 % interval over documents" if evaluation.documents > 1 else ""
    losses = ("bits/byte",) if evaluation.by_byte else ("nats/token", "bits/byte")
    rows = [
        (
            result.label,
            [
                f"{result.parameters:,}",
                *([] if evaluation.by_byte else [str(result.loss.nats_per_token)]),
                str(result.loss.bits_per_byte or "–"),
                str(result.gain_over_frozen or "–"),
                evaluation.speed(result),
            ],
        )
        for result in evaluation.results
    ]
    columns = ["parameters", *losses, "gain over frozen", f"{evaluation.positions}/s"]
    return Grid(evaluation.amount + interval, "model, reading", columns, rows)


def _by_context_length(evaluation: Evaluation) -> Grid:
    unit, cell = _unit_of(evaluation)
    columns = [{row.context_length: row.score for row in result.by_context_length} for result in evaluation.results]
    rows = []
    for T in sorted({length for column in columns for length in column}):
        n = max(evaluation.loss(column[T]).n for column in columns if T in column)
        rows.append((f"{T:,} (n = {n})", [cell(column.get(T)) for column in columns]))
    title = f"Loss by context length (mean over the first T {evaluation.positions}), {unit}"
    return Grid(title, "T", [result.label for result in evaluation.results], rows)
