"""Tables in a terminal (rich), and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from longread.evaluate.figures import Figures, Grid

_BORDERS = 3
"""Characters between the contents of two columns."""
_HEADING = 12
"""Characters that are enough for a heading, which is then broken over several lines."""


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
        table = Table(title=None if first else _verbatim(grid.title), title_justify="left")
        table.add_column(_verbatim(grid.corner), width=names, overflow="fold")
        for heading, width in zip(grid.columns[first:last], wide[first:last], strict=True):
            table.add_column(_verbatim(heading), justify="right", width=width, overflow="fold")
        for (name, row), best in zip(grid.rows, grid.best or [()] * len(grid.rows), strict=True):
            marked = [f"[bold]{_verbatim(cell)}[/]" if i in best else _verbatim(cell) for i, cell in enumerate(row)]
            table.add_row(_verbatim(name), *marked[first:last])
        console.print(table)
        first = last


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is to the left."""
    ruled = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([ruled[0], f"|{'|'.join(['---'] + ['--:'] * (len(head) - 1))}|", *ruled[1:]])


def _verbatim(text: str) -> str:
    """`text` as rich prints it verbatim: intervals are written in brackets, which rich reads as styles."""
    return text.replace("[", r"\[")
