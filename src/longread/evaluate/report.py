"""One self-contained HTML page per run: charts, tables, notes; no script, no external resource."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from longread.evaluate.drawing import draw, finite
from longread.evaluate.figures import Chart, Figures, Grid
from longread.evaluate.svg import palette_css, swatch, to_svg


def html_page(sections: Sequence[str], *, title: str, lead: str) -> str:
    """The page around ready sections, its style included; an empty section is left out."""
    style = palette_css() + files("longread.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>',
            *filter(None, sections),
            "<footer>Written by Longread.</footer>\n</main>\n</body>\n</html>\n",
        ]
    )


def figures_page(figures: Figures, *, title: str, lead: str) -> str:
    """Charts, tables and notes as a page, charts first."""
    return html_page(html_sections(figures), title=title, lead=lead)


def html_sections(figures: Figures) -> list[str]:
    """Charts, tables and notes, to be put on any page."""
    charts = [html_section(chart.title, charts=[chart]) for chart in figures.charts]
    grids = [f"<section><h2>{escape(grid.title)}</h2>{_table(grid)}</section>" for grid in figures.grids]
    notes = "".join(f"<li>{escape(note)}</li>" for note in figures.notes)
    return [*charts, *grids, f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else ""]


def html_section(title: str, about: str = "", *, charts: Sequence[Chart] = (), grids: Sequence[Grid] = ()) -> str:
    """A part of a page: a paragraph, charts, and tables that can be folded away."""
    tables = "".join(f"<details open><summary>{escape(g.title)}</summary>{_table(g)}</details>" for g in grids)
    paragraph = f"<p>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{''.join(map(html_chart, charts))}{tables}</section>"


def html_chart(chart: Chart) -> str:
    """The chart drawn twice, and the page's style shows one: wide, with names at the ends of the lines, or for a narrow
    screen, with a legend below."""
    chart = finite(chart)
    if not chart.lines:
        return ""
    wide = to_svg(draw([chart]), name="wide")
    narrow = to_svg(draw([chart], width=360, height=260, names="apart"), name="narrow")
    legend = "".join(f"<li>{swatch(line)}{escape(line.label)}</li>" for line in chart.lines)
    return f'{wide}\n{narrow}\n<ul class="legend">{legend}</ul>'


def _table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (grid.corner, *grid.columns))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(cell, i in best) for i, cell in enumerate(row))}</tr>'
        for (name, row), best in zip(grid.rows, grid.best or [()] * len(grid.rows), strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, best: bool) -> str:
    """What follows a mean, its interval and its value in another unit, stands back."""
    shown = re.sub(" ([±|].*)", r' <span class="ci">\1</span>', escape(text))
    return f'<td class="best">{shown}</td>' if best else f"<td>{shown}</td>"
