"""A thought as people look at it: text for a terminal, drawings for a page; no script, nothing from elsewhere."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from html import escape

from longread.thinking.thought import ShownTrial, Thought
from longread.thinking.world import CURTAIN, EMPTY, FLOOR, KEY, OPEN, SEALED, WALL, WEDGE, MarbleWorld

_SYMBOLS = {EMPTY: "·", FLOOR: "_", WEDGE: "v", WALL: "#", KEY: "k", SEALED: "g", OPEN: "G"}
_NAMES = {FLOOR: "floor", WEDGE: "wedge", WALL: "wall", KEY: "key", SEALED: "goal", OPEN: "open goal"}
_MARKS = "12*"
"""Cells that the first marble was in, the second, and both."""
_SIDE_BY_SIDE = 5
_CELL = 26
"""Width of a cell in a drawing."""
LEGEND = "a–h curtains · empty # wall v wedge _ floor k key g goal; 1, 2: the marbles, * both"


def symbol(kind: int) -> str:
    """One character for a kind of cell: curtains are their family's letter."""
    return _SYMBOLS.get(kind) or string.ascii_lowercase[kind - CURTAIN]


def as_text(thought: Thought, world: MarbleWorld) -> str:
    """The imagined trials side by side, then the real one."""
    blocks = [
        (f"imagined {number}", _lines(trial, thought.cells, world))
        for number, trial in enumerate(thought.trials, start=1)
    ]
    parts = [_beside(blocks[first : first + _SIDE_BY_SIDE]) for first in range(0, len(blocks), _SIDE_BY_SIDE)]
    parts.append(_beside([("THE REAL TRIAL", _lines(thought.act, thought.cells, world))]))
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _lines(trial: ShownTrial, cells: Sequence[int], world: MarbleWorld) -> list[str]:
    marks: dict[int, str] = {}
    for mark, path in zip(_MARKS, trial.paths, strict=False):
        for place in path:
            marks[place.position] = mark if marks.get(place.position, mark) == mark else _MARKS[-1]
    lines = []
    for row in range(world.rows):
        positions = range(row * world.columns, (row + 1) * world.columns)
        lines.append(" ".join(symbol(cells[p]) + marks.get(p, " ") for p in positions).rstrip())
    return [*lines, _ending(trial)]


def _ending(trial: ShownTrial) -> str:
    return f"{' then '.join(str(action + 1) for action in trial.plan)}: {'solved' if trial.success else 'not solved'}"


def _beside(blocks: Sequence[tuple[str, list[str]]]) -> str:
    width = max(len(line) for name, lines in blocks for line in (name, *lines)) + 3
    rows = zip(*((name, *lines) for name, lines in blocks), strict=True)
    return "\n".join("".join(cell.ljust(width) for cell in row).rstrip() for row in rows)


def html_sections(thought: Thought, world: MarbleWorld) -> list[str]:
    """Sections of a page: the imagined trials, the real one, what the marks mean."""
    figures = "".join(
        _figure(trial, thought.cells, world, f"Imagined trial {number}")
        for number, trial in enumerate(thought.trials, start=1)
    )
    real = _figure(thought.act, thought.cells, world, "The real trial")
    tints = " ".join(f'<span style="color:{_color(tint, world)}">●</span> {tint}' for tint in range(world.columns))
    about = (
        "A line is the way of a marble, 1 before 2; its colour is the marble's tint, which curtains a, b, … change. "
        f"A wedge moves a marble by its tint − {world.columns // 2} columns, round the edge. Bars: how likely the "
        "agent found each column for marble 1 and 2 before it tried."
    )
    imagined = f"<section><h2>In the world model</h2>{_STYLE}<div class='trials'>{figures}</div></section>"
    return [
        imagined if thought.trials else _STYLE,
        f"<section><h2>Then once in the world</h2><div class='trials'>{real}</div></section>",
        f"<section><h2>What is drawn</h2><p>{about}</p><p>Tints: {tints}</p></section>",
    ]


def as_svg(thought: Thought, world: MarbleWorld) -> str:
    """The same as one drawing, readable on light and dark ground."""
    shown = [(f"imagined {number}", trial) for number, trial in enumerate(thought.trials, start=1)]
    shown.append(("the real trial", thought.act))
    wide, high = (world.columns + 1) * _CELL, (world.rows + 3) * _CELL
    columns = min(_SIDE_BY_SIDE, len(shown))
    rows = -(-len(shown) // columns)
    box = f'viewBox="0 0 {columns * wide} {rows * high}"'
    ink = 'style="color:#808080" fill="#808080" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box} {ink}>']
    for number, (name, trial) in enumerate(shown):
        x, y = number % columns * wide + _CELL // 2, number // columns * high
        parts.append(f'<g transform="translate({x} {y})"><text y="14">{name}: {_ending(trial)}</text>')
        parts.append(f'<g transform="translate(0 20)">{_drawing(trial, thought.cells, world, name)}</g></g>')
    return "".join([*parts, "</svg>\n"])


_STYLE = (
    "<style>.trials{display:flex;flex-wrap:wrap;gap:1rem}.trials figure{margin:0}"
    ".trials text{font:12px system-ui,sans-serif;text-anchor:middle;fill:currentColor}</style>"
)


def _figure(trial: ShownTrial, cells: Sequence[int], world: MarbleWorld, name: str) -> str:
    caption = f"<figcaption>{escape(name)}: {_ending(trial)}</figcaption>"
    return f"<figure>{_drawing(trial, cells, world, name)}{caption}</figure>"


def _drawing(trial: ShownTrial, cells: Sequence[int], world: MarbleWorld, name: str) -> str:
    width, bars = world.columns * _CELL, 22
    height = world.rows * _CELL + bars
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(name)}">'
    ]
    for action in range(world.columns):
        for marble, policy in enumerate(trial.policy):
            tall = policy[action] * (bars - 3)
            x = action * _CELL + 4 + marble * (_CELL // 2 - 3)
            parts.append(
                f'<rect x="{x}" y="{bars - 2 - tall:.1f}" width="{_CELL // 2 - 5}" height="{tall:.1f}" '
                f'fill="currentColor" opacity="{0.75 - 0.4 * marble}"/>'
            )
    for position, kind in enumerate(cells):
        x, y = position % world.columns * _CELL, bars + position // world.columns * _CELL
        fill = "currentColor" if kind == WALL else "none"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{fill}" stroke="currentColor" '
            f'stroke-opacity="0.25"><title>{_NAMES.get(kind, symbol(kind))}</title></rect>'
        )
        if kind not in (EMPTY, FLOOR, WALL):
            parts.append(f'<text x="{x + 6}" y="{y + 11}" opacity="0.6">{symbol(kind)}</text>')
    for marble, path in enumerate(trial.paths):
        parts += _way(path, world, marble, bars)
    return "".join([*parts, "</svg>"])


def _way(path: Sequence[tuple[int, int]], world: MarbleWorld, marble: int, top: int) -> list[str]:
    """The way of a marble, each piece in the tint with which the marble moved on."""
    parts, off = [], (marble - 0.5) * 7

    def at(position: int) -> tuple[float, float]:
        x = (position % world.columns + 0.5) * _CELL + off
        return x, top + (position // world.columns + 0.5) * _CELL

    for (position, _), (after, tint) in itertools.pairwise(path):
        (x1, y1), (x2, y2) = at(position), at(after)
        round_edge = abs(after % world.columns - position % world.columns) > world.columns // 2
        dash = ' stroke-dasharray="2 3"' if round_edge else ""
        parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{_color(tint, world)}" stroke-width="3"{dash}/>'
        )
    if path:
        x, y = at(path[-1][0])
        parts.append(f'<circle cx="{x}" cy="{y}" r="6" fill="{_color(path[-1][1], world)}"/>')
        parts.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle" style="fill:#fff">{marble + 1}</text>')
    return parts


def _color(tint: int, world: MarbleWorld) -> str:
    return f"hsl({360 * tint // world.columns} 70% 45%)"
