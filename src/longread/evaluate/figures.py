"""Tables and line charts of any evaluation, and the three places they go to: a terminal, PNG files, an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from longread.evaluate.chart import Line, line_chart
from longread.evaluate.report import html_page

_BORDERS = 3
"""Characters between the contents of two columns."""
_HEADING = 12
"""Characters that are enough for a heading, which is then broken over several lines."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of ready cells; each row begins with its name."""

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis; `name` becomes the name of the PNG file."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    log_x: bool = True


@dataclass(frozen=True, slots=True)
class Figures:
    """What one command shows of its results."""

    grids: list[Grid]
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def print_figures(figures: Figures, console: Console) -> None:
    """Prints every table, then the notes."""
    for grid in figures.grids:
        print_grid(grid, console)
    for note in figures.notes:
        console.print(note, style="dim", markup=False)


def print_grid(grid: Grid, console: Console) -> None:
    """Prints a table. Columns that do not fit side by side follow below, with the names of the rows again."""
    cells = [max([cell_len(row[i]) for _, row in grid.rows], default=0) for i in range(len(grid.columns))]
    wide = [max(size, cell_len(heading)) for size, heading in zip(cells, grid.columns, strict=True)]
    names = max(cell_len(name) for name in (grid.corner, *(name for name, _ in grid.rows)))
    if sum(wide) + names + _BORDERS * (len(wide) + 1) + 1 > console.width:
        wide = [max(size, min(room, _HEADING)) for size, room in zip(cells, wide, strict=True)]
        names = min(names, max(_HEADING, console.width - max(wide, default=0) - 2 * _BORDERS - 1))
    first = 0
    while first < len(wide):
        last, room = first + 1, console.width - names - _BORDERS - 1 - wide[first] - _BORDERS
        while last < len(wide) and room >= wide[last] + _BORDERS:
            room -= wide[last] + _BORDERS
            last += 1
        table = Table(title=None if first else escape_markup(grid.title), title_justify="left")
        table.add_column(escape_markup(grid.corner), width=names, overflow="fold")
        for heading, width in zip(grid.columns[first:last], wide[first:last], strict=True):
            table.add_column(escape_markup(heading), justify="right", width=width, overflow="fold")
        for name, row in grid.rows:
            table.add_row(*map(escape_markup, (name, *row[first:last])))
        console.print(table)
        first = last


def figures_page(figures: Figures, *, title: str, lead: str) -> str:
    """The same as one self-contained HTML page, charts first."""
    return html_page(html_sections(figures), title=title, lead=lead)


def html_sections(figures: Figures) -> list[str]:
    """Charts, tables and notes, to be put on any page."""
    sections = [
        f"<section><h2>{escape(chart.title)}</h2>"
        + line_chart(chart.lines, title=chart.title, x_label=chart.x_label, y_label=chart.y_label, log_x=chart.log_x)
        + "</section>"
        for chart in figures.charts
    ]
    sections += [f"<section><h2>{escape(grid.title)}</h2>{_html_table(grid)}</section>" for grid in figures.grids]
    if figures.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in figures.notes)
        sections.append(f"<section><h2>Notes</h2><ul>{items}</ul></section>")
    return sections


def escape_markup(text: str) -> str:
    """`text` as rich prints it verbatim: intervals are written in brackets, which rich reads as styles."""
    return text.replace("[", r"\[")


def _html_table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (grid.corner, *grid.columns))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in grid.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def colors(models: Sequence[str], palette: int = 6) -> dict[str, int]:
    """A place in the palette for each model, in order of appearance."""
    return {model: i % palette for i, model in enumerate(dict.fromkeys(models))}
