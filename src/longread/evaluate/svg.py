"""Drawings as SVG: it follows the reader's light or dark theme, and needs no package."""

from __future__ import annotations

from html import escape

from longread.evaluate.drawing import BOLD, FILLS, PALETTE, SIZES, STROKES, Drawing, Mark, Stroke, Words, sample
from longread.evaluate.figures import Line

_RADII = {"circle": 3.6, "dot": 2.4}
_FORMS = {"square": "m-3.6,-3.6h7.2v7.2h-7.2z", "triangle": "m0,-5l5,9h-10z"}


def to_svg(drawing: Drawing, *, name: str = "", alone: bool = False) -> str:
    """The drawing as an SVG element; `alone`: as a file of its own, with the colours that a page has once for all."""
    size = f'viewBox="0 0 {drawing.width} {drawing.height}"' + (f' width="{drawing.width}"' if alone else "")
    space = 'xmlns="http://www.w3.org/2000/svg" ' if alone else ""
    title = escape(drawing.title)
    said = f'aria-label="{title}" role="img"' if title else 'aria-hidden="true"'
    style = f'<style>{palette_css()}</style>\n<g font-family="system-ui, sans-serif">' if alone else "<g>"
    return "\n".join(
        [
            f'<svg {space}class="{f"chart {name}".strip()}" {size} {said}>',
            *([f"<title>{title}</title>"] if title else []),
            style,
            *map(_element, drawing.parts),
            "</g></svg>" + ("\n" if alone else ""),
        ]
    )


def palette_css() -> str:
    """The colours as variables and classes, for light and for dark themes."""
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    classes = " ".join(f".{name} {{ color: var(--{name}) }}" for name in PALETTE)
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{classes}\n"


def swatch(line: Line) -> str:
    """A small picture of how a line is drawn, for the legend of a page."""
    return to_svg(Drawing(30, 10, "", sample(line, 1, 5)))


def _element(part: Stroke | Mark | Words) -> str:
    """One part as SVG."""
    if isinstance(part, Words):
        (x, y), bold = part.at, ' font-weight="600"' if part.kind in BOLD else ""
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if part.upright else ""
        return (
            f'<text class="{part.kind} {part.color}" x="{x:.1f}" y="{y:.1f}" fill="currentColor" '
            f'font-size="{SIZES[part.kind]}"{bold} text-anchor="{part.anchor}"{turned}>{escape(part.text)}</text>'
        )
    tip = f"<title>{escape(part.tip)}</title>" if part.tip else ""
    if isinstance(part, Mark):
        (x, y), shared = part.at, f'class="mark {part.color}" fill="currentColor"'
        if part.form in _RADII:
            return f'<circle {shared} cx="{x:.1f}" cy="{y:.1f}" r="{_RADII[part.form]}">{tip}</circle>'
        return f'<path {shared} d="M{x:.1f},{y:.1f}{_FORMS[part.form]}">{tip}</path>'
    d = "L".join(f"{x:.1f},{y:.1f}" for x, y in part.points)
    shared = f'class="{part.kind} {part.color}" d="M{d}'
    if part.kind in FILLS:
        return f'<path {shared}Z" fill="currentColor" fill-opacity="{FILLS[part.kind]:g}">{tip}</path>'
    width, opacity = STROKES[part.kind]
    dash = f' stroke-dasharray="{" ".join(map(str, part.dash))}"' if part.dash else ""
    ink = f'stroke="currentColor" stroke-width="{width:g}" stroke-opacity="{opacity:g}" stroke-linejoin="round"{dash}'
    return f'<path {shared}" fill="none" {ink}/>'
