"""One self-contained HTML page per run: figures, charts, tables; no script, no external resource."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import sqrt

from longread.evaluate.chart import Line, line_chart
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
        loss, bits = result.loss.nats_per_token, result.loss.bits_per_byte
        more = [f"± {loss.half_width:.3f}"] if loss.low is not None else []
        more += [f"{bits.mean:.3f} bits per byte"] if bits else []
        if result.gain_over_frozen:
            more.append(f"{result.gain_over_frozen.mean:+.3f} gained by learning")
        tiles.append(
            f'<div class="tile c{_color(evaluation, result.model)}"><div class="who">{escape(result.label)}</div>'
            f'<div class="value">{loss.mean:.3f}</div>'
            f'<div class="more">nats per token<br>{"<br>".join(map(escape, more))}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _positions(evaluation: Evaluation) -> str:
    lines = []
    for result in evaluation.results:
        # Bins that hold too few tokens are noise, not signal: the octave table below still has them.
        shown = [row for row in result.curve if row.end > row.start and row.end > 16]
        bounds = [(row.score.nats_per_token.low, row.score.nats_per_token.high) for row in shown]
        lines.append(
            Line(
                result.label,
                [(sqrt(max(row.start, 8) * row.end), row.score.nats_per_token.mean) for row in shown],
                [(low, high) for low, high in bounds if low is not None and high is not None]
                if all(low is not None for low, _ in bounds)
                else None,
                _color(evaluation, result.model),
                result.reading == "frozen",
            )
        )
    chart = line_chart(
        lines, title="Loss by position", x_label="position in the text, tokens (log scale)", y_label="nats per token"
    )
    about = "How well the next token is predicted after so many tokens have been read; lower is better."
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
    lines = [
        Line(
            result.label,
            [(row.context_length, row.score.nats_per_token.mean) for row in result.by_context_length],
            color=_color(evaluation, result.model),
            dashed=result.reading == "frozen",
        )
        for result in evaluation.results
    ]
    chart = ""
    if max(len(line.points) for line in lines) > 1:
        chart = line_chart(
            lines, title="Loss by context length", x_label="context length T (log scale)", y_label="nats per token"
        )
    whole = _score_table(
        evaluation,
        "Mean over the first T tokens",
        "T",
        lambda result: {
            (row.context_length, f"{row.context_length:,} (n = {row.score.nats_per_token.n})"): row.score
            for row in result.by_context_length
        },
    )
    last = _score_table(
        evaluation,
        "Last half alone, tokens T/2 to T",
        "T",
        lambda result: {
            (row.context_length, f"{row.context_length:,} (n = {row.last_half.nats_per_token.n})"): row.last_half
            for row in result.by_context_length
        },
    )
    about = "Each row takes the documents that are at least T tokens long; n is their number."
    return f"<section><h2>Loss by context length</h2><p>{about}</p>{chart}{whole}{last}</section>"


def _score_table(
    evaluation: Evaluation, name: str, corner: str, rows: Callable[[Result], dict[tuple[int, str], Score]]
) -> str:
    columns = [rows(result) for result in evaluation.results]
    keys = sorted({key for column in columns for key in column})
    body = []
    for key in keys:
        scores = [column.get(key) for column in columns]
        best = min(score.nats_per_token.mean for score in scores if score)
        cells = "".join(_score_cell(score, best) for score in scores)
        body.append(f'<tr><th scope="row">{key[1]}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(result.label)}</th>' for result in evaluation.results)
    return (
        f'<details open><summary>{name}</summary><div class="scroll"><table><thead><tr><th scope="col">{corner}</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _score_cell(score: Score | None, best: float) -> str:
    if score is None:
        return "<td>–</td>"
    loss = score.nats_per_token
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
            drift = ", ".join(f"{100 * value:.1f} % after {position:,}" for position, value in health.drift)
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
        bits = f"{result.loss.bits_per_byte}" if result.loss.bits_per_byte else "–"
        speed = f"{result.tokens / result.seconds:,.0f}" if result.seconds else "–"
        rows.append(
            f'<tr><th scope="row">{escape(result.label)}</th><td>{result.parameters:,}</td>'
            f"<td>{result.fast_weights:,}</td><td>{result.loss.nats_per_token}</td><td>{bits}</td>"
            f"<td>{result.gain_over_frozen or '–'}</td><td>{speed}</td></tr>"
        )
    heads = ["model, reading", "parameters", "of them fast", "nats per token", "bits per byte", "gain over frozen"]
    heads.append("tokens/s")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    amount = f"{evaluation.documents} document{'' if evaluation.documents == 1 else 's'}, {evaluation.tokens:,} tokens"
    return (
        f"<section><h2>Models</h2><p>{amount}. Frozen is the control: the same weights without inner steps.</p>"
        f"{_table(head, rows)}</section>"
    )


def _notes(evaluation: Evaluation) -> str:
    if not evaluation.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in evaluation.notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>"
