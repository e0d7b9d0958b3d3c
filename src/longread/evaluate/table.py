"""The figures as plain-text tables."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from longread.evaluate.summary import Evaluation, PositionScore, Result, Score


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Prints the overview, loss by position and, where documents are long enough, loss by context length."""
    console.print(_overview(evaluation))
    console.print(by_position_table(evaluation, lambda result: result.by_position, "Loss by position"))
    if any(result.by_context_length for result in evaluation.results):
        console.print(_by_context_length(evaluation))
    if any(result.at_index for result in evaluation.results):
        console.print(by_position_table(evaluation, lambda result: result.at_index, "Loss at chosen positions"))
    for note in evaluation.notes:
        console.print(note, style="dim", markup=False)


def by_position_table(evaluation: Evaluation, rows: Callable[[Result], list[PositionScore]], title: str) -> Table:
    """A column per result, a row per position bin."""
    unit, pick = unit_of(evaluation)
    table = Table(title=f"{title}, {unit}", title_justify="left")
    table.add_column("bytes" if evaluation.by_byte else "positions", justify="right")
    bins: dict[tuple[int, int], None] = {}
    scores = []
    for result in evaluation.results:
        table.add_column(result.label, justify="right")
        scores.append({(row.start, row.end): row.score for row in rows(result)})
        bins.update(dict.fromkeys(scores[-1]))
    for start, end in sorted(bins):
        place = f"{start:,}" if end == start + 1 else f"{start:,}–{end:,}"
        table.add_row(place, *(pick(column.get((start, end))) for column in scores))
    return table


def unit_of(evaluation: Evaluation) -> tuple[str, Callable[[Score | None], str]]:
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


def _overview(evaluation: Evaluation) -> Table:
    interval = "; ± is a 95 % interval over documents" if evaluation.documents > 1 else ""
    table = Table(title=evaluation.amount + interval, title_justify="left")
    table.add_column("model, reading")
    losses = ("bits/byte",) if evaluation.by_byte else ("nats/token", "bits/byte")
    for heading in ("parameters", *losses, "gain over frozen", f"{evaluation.positions}/s"):
        table.add_column(heading, justify="right")
    for result in evaluation.results:
        table.add_row(
            result.label,
            f"{result.parameters:,}",
            *([] if evaluation.by_byte else [str(result.loss.nats_per_token)]),
            str(result.loss.bits_per_byte or "–"),
            str(result.gain_over_frozen or "–"),
            evaluation.speed(result),
        )
    return table


def _by_context_length(evaluation: Evaluation) -> Table:
    unit, pick = unit_of(evaluation)
    table = Table(
        title=f"Loss by context length (mean over the first T {evaluation.positions}), {unit}", title_justify="left"
    )
    table.add_column("T", justify="right")
    table.add_column("n", justify="right")
    columns = []
    for result in evaluation.results:
        table.add_column(result.label, justify="right")
        columns.append({row.context_length: row for row in result.by_context_length})
    for length in sorted({T for column in columns for T in column}):
        n = max(evaluation.loss(column[length].score).n for column in columns if length in column)
        cells = [pick(column[length].score) if length in column else "–" for column in columns]
        table.add_row(f"{length:,}", str(n), *cells)
    return table
