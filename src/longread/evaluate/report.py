"""One self-contained HTML page per run: figures, charts, tables; no script, no external resource."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import sqrt

from longread.evaluate.chart import Line, estimate_line, line_chart
from longread.evaluate.estimate import Estimate
from longread.evaluate.summary import Evaluation, PositionScore, Result, Score

PALETTE = 6


def html_report(
    evaluation: Evaluation,
    *,
    title: str,
    lead: str = "",
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    more: Sequence[str] = (),
) -> str:
    """Renders the whole page.

    Args:
        lead: a sentence or two under the title; plain text.
        more: ready sections, before the table of models.
        training: per model, (step, training loss) points for a chart of the runs that made the models.
    """
    sections = [
        _tiles(evaluation),
        _positions(evaluation),
        _context_lengths(evaluation),
        _training(evaluation, training or {}),
        _inner_loop(evaluation),
        *more,
        _models(evaluation),
        _notes(evaluation),
    ]
    return html_page(sections, title=title, lead=lead)


def html_page(sections: Sequence[str], *, title: str, lead: str) -> str:
    """The page around ready sections, its style included; an empty section is left out."""
    style = files("longread.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>',
            *(section for section in sections if section),
            "<footer>Written by Longread.</footer>\n</main>\n</body>\n</html>\n",
        ]
    )


def _color(evaluation: Evaluation, model: str) -> int:
    return list(dict.fromkeys(result.model for result in evaluation.results)).index(model) % PALETTE


def _tiles(evaluation: Evaluation) -> str:
    tiles = []
    for result in evaluation.results:
        loss, bits = evaluation.loss(result.loss), result.loss.bits_per_byte
        more = [f"± {loss.half_width:.3f}"] if loss.low is not None else []
        more += [f"{bits.mean:.3f} bits per byte"] if bits and not evaluation.by_byte else []
        if result.gain_over_frozen:
            more.append(f"{result.gain_over_frozen.mean:+.3f} gained by learning")
        tiles.append(
            f'<div class="tile c{_color(evaluation, result.model)}"><div class="who">{escape(result.label)}</div>'
            f'<div class="value">{loss.mean:.3f}</div>'
            f'<div class="more">{evaluation.unit}<br>{"<br>".join(map(escape, more))}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _positions(evaluation: Evaluation) -> str:
    lines = []
    for result in evaluation.results:
        # Bins that hold too few tokens are noise, not signal: the octave table below still has them.
        shown = [row for row in result.curve if row.end > row.start and row.end > 16]
        points = [(sqrt(max(row.start, 8) * row.end), evaluation.loss(row.score)) for row in shown]
        color = _color(evaluation, result.model)
        lines.append(estimate_line(result.label, points, color, result.reading == "frozen"))
    positions = evaluation.positions
    chart = line_chart(
        lines,
        title="Loss by position",
        x_label=f"position in the text, {positions} (log scale)",
        y_label=evaluation.unit,
    )
    about = (
        f"How well the next {positions[:-1]} is predicted after so many {positions} have been read; lower is better."
    )
    if evaluation.documents > 1:
        about += " Shaded: 95 % interval over documents."
    extra = ""
    if any(result.at_index for result in evaluation.results):
        extra = _score_table(evaluation, "At chosen positions", "position", lambda result: _rows(result.at_index))
    table = _score_table(evaluation, "The same in numbers", "positions", lambda result: _rows(result.by_position))
    return f"<section><h2>Loss by position</h2><p>{about}</p>{chart}{table}{extra}</section>"


def _rows(scores: Sequence[PositionScore]) -> dict[tuple[int, str], Score]:
    return {
        (row.start, f"{row.start:,}" if row.end == row.start + 1 else f"{row.start:,}–{row.end:,}"): row.score
        for row in scores
    }


def _context_lengths(evaluation: Evaluation) -> str:
    if not any(result.by_context_length for result in evaluation.results):
        return ""
    positions = evaluation.positions
    lines = [
        Line(
            result.label,
            [(row.context_length, evaluation.loss(row.score).mean) for row in result.by_context_length],
            color=_color(evaluation, result.model),
            dashed=result.reading == "frozen",
        )
        for result in evaluation.results
    ]
    chart = ""
    if max(len(line.points) for line in lines) > 1:
        chart = line_chart(
            lines,
            title="Loss by context length",
            x_label=f"context length T, {positions} (log scale)",
            y_label=evaluation.unit,
        )
    whole = _score_table(
        evaluation,
        f"Mean over the first T {positions}",
        "T",
        lambda result: {
            (row.context_length, f"{row.context_length:,} (n = {evaluation.loss(row.score).n})"): row.score
            for row in result.by_context_length
        },
    )
    last = _score_table(
        evaluation,
        f"Last half alone, {positions} T/2 to T",
        "T",
        lambda result: {
            (row.context_length, f"{row.context_length:,} (n = {evaluation.loss(row.last_half).n})"): row.last_half
            for row in result.by_context_length
        },
    )
    about = f"Each row takes the documents that are at least T {positions} long; n is their number."
    return f"<section><h2>Loss by context length</h2><p>{about}</p>{chart}{whole}{last}</section>"


def _score_table(
    evaluation: Evaluation, name: str, corner: str, rows: Callable[[Result], dict[tuple[int, str], Score]]
) -> str:
    columns = [rows(result) for result in evaluation.results]
    keys = sorted({key for column in columns for key in column})
    body = []
    for key in keys:
        scores = [column.get(key) for column in columns]
        losses = [evaluation.loss(score) if score else None for score in scores]
        best = min(loss.mean for loss in losses if loss)
        cells = "".join(_loss_cell(loss, best) for loss in losses)
        body.append(f'<tr><th scope="row">{key[1]}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(result.label)}</th>' for result in evaluation.results)
    return (
        f'<details open><summary>{name}</summary><div class="scroll"><table><thead><tr><th scope="col">{corner}</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _loss_cell(loss: Estimate | None, best: float) -> str:
    if loss is None:
        return "<td>–</td>"
    interval = f' <span class="ci">± {loss.half_width:.3f}</span>' if loss.low is not None else ""
    kind = ' class="best"' if loss.mean == best else ""
    return f"<td{kind}>{loss.mean:.3f}{interval}</td>"


def _training(evaluation: Evaluation, training: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    names = {result.model for result in evaluation.results}
    lines = [
        Line(name, [(step, loss) for step, loss in points], color=_color(evaluation, name))
        for name, points in training.items()
        if name in names
    ]
    chart = line_chart(lines, title="Training loss", x_label="outer step", y_label="nats per token", log_x=False)
    return (
        f"<section><h2>Training loss</h2><p>The loss that the outer optimizer saw.</p>{chart}</section>"
        if chart
        else ""
    )


def _inner_loop(evaluation: Evaluation) -> str:
    rows = []
    for result in evaluation.results:
        if health := result.health:
            drift = ", ".join(f"{100 * value:.1f} % after {position:,} tokens" for position, value in health.drift)
            rows.append(
                f'<tr><th scope="row">{escape(result.model)}</th><td>{health.steps:,}</td>'
                f"<td>{health.mean_gradient_norm:.3f}</td><td>{health.largest_gradient_norm:.3f}</td>"
                f"<td>{100 * health.clipped_share:.1f} %</td><td>{drift or '–'}</td></tr>"
            )
    if not rows:
        return ""
    heads = ("model", "inner steps", "mean gradient norm", "largest", "clipped", "drift of the fast weights")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        "<section><h2>Inner loop</h2><p>One step per mini-batch read. Drift is the distance of the fast weights from "
        "where they began, relative to their size.</p>"
        f"{_table(head, rows)}</section>"
    )


def _table(head: str, rows: Sequence[str]) -> str:
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _models(evaluation: Evaluation) -> str:
    rows = []
    for result in evaluation.results:
        nats = "" if evaluation.by_byte else f"<td>{result.loss.nats_per_token}</td>"
        rows.append(
            f'<tr><th scope="row">{escape(result.label)}</th><td>{result.parameters:,}</td>'
            f"<td>{result.fast_weights:,}</td>{nats}<td>{result.loss.bits_per_byte or '–'}</td>"
            f"<td>{result.gain_over_frozen or '–'}</td><td>{evaluation.speed(result)}</td></tr>"
        )
    losses = ["bits per byte"] if evaluation.by_byte else ["nats per token", "bits per byte"]
    heads = ["model, reading", "parameters", "of them fast", *losses, "gain over frozen", f"{evaluation.positions}/s"]
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f"<section><h2>Models</h2><p>{evaluation.amount}. Frozen is the control: the same weights without inner "
        f"steps.</p>{_table(head, rows)}</section>"
    )


def _notes(evaluation: Evaluation) -> str:
    if not evaluation.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in evaluation.notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>"
