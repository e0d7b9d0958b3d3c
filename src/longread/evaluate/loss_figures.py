"""An evaluation's losses as tables and charts, in a terminal and as a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import sqrt

from rich.console import Console

from longread.evaluate.figures import Chart, Figures, Grid, colors, estimate_line
from longread.evaluate.report import html_page, html_section, html_sections
from longread.evaluate.summary import Evaluation, PositionScore, Result, Score
from longread.evaluate.table import print_figures

_Rows = Callable[[Result], Mapping[tuple[int, str], Score]]


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Prints the overview, loss by position and, where documents are long enough, loss by context length."""
    grids = [_overview(evaluation), _by_position(evaluation)]
    grids += [_by_length(evaluation)] if any(result.by_context_length for result in evaluation.results) else []
    grids += _at_index(evaluation)
    print_figures(Figures(grids, notes=evaluation.notes), console)


def html_report(
    evaluation: Evaluation,
    *,
    title: str,
    lead: str = "",
    more: Figures | None = None,
) -> str:
    """Renders the whole page.

    Args:
        lead: a sentence or two under the title; plain text.
        more: charts and tables that are put before the table of models.
    """
    positions = evaluation.positions
    by_position, *by_length = evaluation_charts(evaluation)
    about = (
        f"How well the next {positions[:-1]} is predicted after so many {positions} have been read; lower is better."
    )
    about += " Shaded: 95 % interval over documents." if evaluation.documents > 1 else ""
    grids = [_by_position(evaluation), *_at_index(evaluation)]
    sections = [_tiles(evaluation), html_section("Loss by position", about, charts=[by_position], grids=grids)]
    if by_length:
        about = f"Each row takes the documents that are at least T {positions} long; n is their number."
        grids = [_by_length(evaluation), _by_length(evaluation, last_half=True)]
        if all(len(line.points) < 2 for line in by_length[0].lines):
            by_length = []
        sections.append(html_section("Loss by context length", about, charts=by_length, grids=grids))
    if any(result.health for result in evaluation.results):
        about = "Drift is the distance of the fast weights from where they began, relative to their size."
        sections.append(html_section("Inner loop", about, grids=[_inner_loop(evaluation)]))
    about = "Frozen is the control: the same weights without inner steps."
    sections += html_sections(more) if more else []
    sections.append(html_section("Models", about, grids=[_overview(evaluation, fast=True)]))
    return html_page([*sections, *html_sections(Figures([], notes=evaluation.notes))], title=title, lead=lead)


def evaluation_charts(evaluation: Evaluation) -> list[Chart]:
    """Loss by position and, where documents are long enough, by context length."""
    color, loss = colors([result.model for result in evaluation.results]), evaluation.loss
    by_position, by_length = [], []
    for result in evaluation.results:
        look = (color[result.model], result.reading == "frozen")
        # The first bins hold too few tokens, noise and not signal: the table has them.
        shown = [row for row in result.curve if row.end > max(row.start, 16)]
        points = [(sqrt(max(row.start, 8) * row.end), loss(row.score)) for row in shown]
        by_position.append(estimate_line(result.label, points, *look))
        lengths = [(float(row.context_length), loss(row.score)) for row in result.by_context_length]
        by_length.append(estimate_line(result.label, lengths, *look))
    unit, positions = evaluation.unit, evaluation.positions
    charts = [Chart("loss_by_position", "Loss by position", f"position, {positions}", unit, by_position)]
    if any(line.points for line in by_length):
        x_label = f"context length T, {positions}"
        charts.append(Chart("loss_by_context_length", "Loss by context length", x_label, unit, by_length))
    return charts


def _overview(evaluation: Evaluation, *, fast: bool = False) -> Grid:
    """A row per result; `fast`: the number of fast weights too."""
    interval = "; ± is a 95 % interval over documents" if evaluation.documents > 1 else ""
    columns = ["parameters", *(["of them fast"] if fast else [])]
    columns += ["bits/byte"] if evaluation.by_byte else ["nats/token", "bits/byte"]
    rows = [
        (
            result.label,
            [
                f"{result.parameters:,}",
                *([f"{result.fast_weights:,}"] if fast else []),
                *([] if evaluation.by_byte else [str(result.loss.nats_per_token)]),
                str(result.loss.bits_per_byte or "–"),
                str(result.gain_over_frozen or "–"),
                evaluation.speed(result),
            ],
        )
        for result in evaluation.results
    ]
    columns += ["gain over frozen", f"{evaluation.positions}/s"]
    return Grid(evaluation.amount + interval, "model, reading", columns, rows)


def _by_position(evaluation: Evaluation) -> Grid:
    corner = "bytes" if evaluation.by_byte else "positions"
    return _scores(evaluation, "Loss by position", corner, lambda result: _bins(result.by_position))


def _at_index(evaluation: Evaluation) -> list[Grid]:
    if not any(result.at_index for result in evaluation.results):
        return []
    return [_scores(evaluation, "Loss at chosen positions", "position", lambda result: _bins(result.at_index))]


def _bins(scores: Sequence[PositionScore]) -> dict[tuple[int, str], Score]:
    return {
        (row.start, f"{row.start:,}" if row.end == row.start + 1 else f"{row.start:,}–{row.end:,}"): row.score
        for row in scores
    }


def _by_length(evaluation: Evaluation, *, last_half: bool = False) -> Grid:
    def rows(result: Result) -> dict[tuple[int, str], Score]:
        scores = [(row.context_length, row.last_half if last_half else row.score) for row in result.by_context_length]
        return {(T, f"{T:,} (n = {evaluation.loss(score).n})"): score for T, score in scores}

    positions = evaluation.positions
    part = f"of the last half, {positions} T/2 to T" if last_half else f"mean over the first T {positions}"
    return _scores(evaluation, f"Loss by context length ({part})", "T", rows)


def _scores(evaluation: Evaluation, title: str, corner: str, rows: _Rows) -> Grid:
    """A column per result; in bits per byte where tokenizers differ, else in both units where bytes are known."""
    both = not evaluation.by_byte and evaluation.bytes is not None
    both = both and any(result.loss.bits_per_byte for result in evaluation.results)

    def cell(score: Score | None) -> str:
        if not score:
            return "–"
        bits = f" | {score.bits_per_byte.mean:.3f}" if both and score.bits_per_byte else ""
        return f"{evaluation.loss(score)}{bits}"

    columns = [rows(result) for result in evaluation.results]
    keys = sorted({key for column in columns for key in column})
    scores = [[column.get(key) for column in columns] for key in keys]
    means = [[f"{evaluation.loss(score).mean:.3f}" if score else "inf" for score in row] for row in scores]
    best = [{i for i, mean in enumerate(row) if mean == min(row, key=float) != max(row, key=float)} for row in means]
    return Grid(
        f"{title}, {evaluation.unit}{' | bits per byte' if both else ''}",
        corner,
        [result.label for result in evaluation.results],
        [(name, [cell(score) for score in row]) for (_, name), row in zip(keys, scores, strict=True)],
        best,
    )


def _inner_loop(evaluation: Evaluation) -> Grid:
    columns = ["inner steps", "mean gradient norm", "largest", "clipped", "drift of the fast weights"]
    rows = []
    for result in evaluation.results:
        if health := result.health:
            drift = ", ".join(f"{100 * value:.1f} % after {position:,} tokens" for position, value in health.drift)
            norms = [f"{health.mean_gradient_norm:.3f}", f"{health.largest_gradient_norm:.3f}"]
            rows.append(
                (result.model, [f"{health.steps:,}", *norms, f"{100 * health.clipped_share:.1f} %", drift or "–"])
            )
    return Grid("One step per mini-batch read", "model", columns, rows)


def _tiles(evaluation: Evaluation) -> str:
    """The loss of each result, large, to begin a page with."""
    color, tiles = colors([result.model for result in evaluation.results]), []
    for result in evaluation.results:
        loss, bits = evaluation.loss(result.loss), result.loss.bits_per_byte
        more = [f"± {loss.half_width:.3f}"] if loss.low is not None else []
        more += [f"{bits.mean:.3f} bits per byte"] if bits and not evaluation.by_byte else []
        if result.gain_over_frozen:
            more.append(f"{result.gain_over_frozen.mean:+.3f} gained by learning")
        tiles.append(
            f'<div class="tile c{color[result.model]}"><div class="who">{escape(result.label)}</div>'
            f'<div class="value">{loss.mean:.3f}</div>'
            f'<div class="more">{evaluation.unit}<br>{"<br>".join(map(escape, more))}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'
