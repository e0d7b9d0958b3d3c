"""Plots of the rows for a README: SVG by hand, readable on light and on dark paper and without colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from longread.bench.cases import METHODS, SIZE_NAMES
from longread.bench.report import NAMES
from longread.bench.rows import Row
from longread.files import atomic_files

PANEL, HEIGHT, LEFT, TOP, BOTTOM, GAP = 300, 300, 62, 56, 48, 56
PLOT = HEIGHT - TOP - BOTTOM
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a } .title { font-weight: 600 } .narrow { font-size: 9px }
.grid { stroke: #8c959f55 }
.e2e { --c: #cf4a1c } .swa { --c: #1a7f64 } .full { --c: #3366cc } path, rect, .line { fill: var(--c) }
.line { fill: none; stroke: var(--c); stroke-width: 2.2 } .swa .line { stroke-dasharray: 7 4 }
.full .line { stroke-dasharray: 2 3 }
@media (prefers-color-scheme: dark) {
text { fill: #adbac7 } .e2e { --c: #ff8a5c } .swa { --c: #4fd1ab } .full { --c: #82aaff } }
"""
MARKS = {"e2e": "m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "swa": "m-4,-4h8v8h-8z", "full": "m0,-5l5,9h-10z"}

Panel = Callable[[Sequence[Row], float], list[str]]


def save_bench_plots(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Writes `prefill.svg`, `training.svg` and `decoding.svg`, those of which there are rows, whole or not at all."""
    paths = []
    for name, measure, panel, label in (
        ("prefill", "prefill_ms_per_1k", _lines, "ms per 1K tokens read"),
        ("training", "train_tokens_per_s", _bars, "tokens per second of training"),
        ("decoding", "decode_tokens_per_s", _lines, "tokens per second written"),
    ):
        chosen = [row for row in rows if row["measure"] == measure]
        if chosen:
            path = directory / f"{name}.svg"
            with atomic_files(path) as (temporary,):
                temporary.write_text(_page(chosen, panel, label), encoding="utf-8")
            paths.append(path)
    return paths


def _page(rows: Sequence[Row], panel: Panel, label: str) -> str:
    sizes = sorted({row["size"] for row in rows}, key=SIZE_NAMES.index)
    width = max(520, len(sizes) * (LEFT + PANEL) + GAP // 2)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" role="img">']
    parts += [f"<title>{label}</title>", f"<style>{STYLE}</style>", *_legend(rows, label)]
    for i, size in enumerate(sizes):
        of_size = [row for row in rows if row["size"] == size]
        ticks = _ticks(max(row["value"] for row in of_size))
        title = size.upper() if size[0].isdigit() else size
        parts.append(f'<g transform="translate({LEFT + i * (LEFT + PANEL)} 0)">')
        parts.append(_text(PANEL - GAP, TOP - 8, title, "end", "title"))
        for tick in ticks:
            y = _y(tick, ticks[-1])
            parts.append(f'<line class="grid" x1="0" x2="{PANEL - GAP / 2}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(-8, y + 4, short(tick), "end"))
        parts += [*panel(of_size, ticks[-1]), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(rows: Sequence[Row], label: str) -> Iterable[str]:
    x = 8.0
    yield _text(x, 18, label, "start", "title")
    x += 7.5 * len(label) + 16
    for method in METHODS:
        if any(row["method"] == method for row in rows):
            yield f'<g class="{method}"><path d="M{x:.0f},14{MARKS[method]}"/></g>'
            yield _text(x + 10, 18, NAMES[method])
            x += 7 * len(NAMES[method]) + 34
    if any(map(computes_again, rows)):
        yield _text(x, 18, "* activations computed again")


def _lines(rows: Sequence[Row], top: float) -> list[str]:
    """A value against the logarithm of the context."""
    contexts = sorted({row["context"] for row in rows})
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])
    place = {c: (PANEL - GAP) * ((math.log2(c) - low) / (high - low) if high > low else 0.5) for c in contexts}
    shown = [c for before, c in pairwise([None, *contexts]) if before is None or place[c] - place[before] > 24]
    parts = [_text(place[c], HEIGHT - BOTTOM + 18, tokens(c), "middle") for c in shown]
    parts.append(_text((PANEL - GAP) / 2, HEIGHT - 8, "tokens of context", "middle"))
    for method in METHODS:
        points = sorted((row["context"], row["value"]) for row in rows if row["method"] == method)
        at = [(place[context], _y(value, top)) for context, value in points]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<g class="{method}"><polyline class="line" points="{corners}"/>')
        for (context, value), (x, y) in zip(points, at, strict=True):
            tip = f"<title>{NAMES[method]}, {context:,} tokens: {value:,g}</title>"
            parts.append(f'<path d="M{x:.1f},{y:.1f}{MARKS[method]}">{tip}</path>')
        parts.append("</g>")
    return parts


def _bars(rows: Sequence[Row], top: float) -> list[str]:
    """A group of bars for each context and number of sequences."""
    groups = sorted({(row["context"], row["sequences"]) for row in rows})
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    width = (PANEL - GAP / 2) / len(groups)
    bar = min(40.0, width * 0.8 / len(methods))
    parts = []
    for i, (context, sequences) in enumerate(groups):
        middle = width * (i + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 18, f"{tokens(context)} × {sequences}", "middle"))
        for j, method in enumerate(methods):
            left = middle + bar * (j - len(methods) / 2)
            for row in rows:
                if (row["context"], row["sequences"], row["method"]) == (context, sequences, method):
                    y = _y(row["value"], top)
                    box = f'x="{left + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
                    parts.append(f'<g class="{method}"><rect {box}/></g>')
                    value = short(row["value"]) + ("*" if computes_again(row) else "")
                    parts.append(_text(left + bar / 2, y - 5, value, "middle", "narrow" if bar < 30 else ""))
    parts.append(_text((PANEL - GAP / 2) / 2, HEIGHT - 8, "tokens of context × sequences", "middle"))
    return parts


def computes_again(row: Row) -> bool:
    """Whether a training step computes some activations twice, for want of memory."""
    return bool(row.get("recompute", "none") != "none")


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to above the highest value."""
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if highest / (factor * power) <= 5)
    return [i * step for i in range(math.floor(highest * 1.06 / step) + 2)]


def _y(value: float, top: float) -> float:
    return TOP + PLOT * (1 - value / top)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def tokens(count: int) -> str:
    """8192 is 8K, and 2^20 is 1M."""
    if count >= 2**20 and count % 2**20 == 0:
        return f"{count // 2**20}M"
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)


def short(value: float) -> str:
    """Three digits, in thousands from 1000 on."""
    return f"{value / 1e3:.3g}K" if value >= 1000 else f"{value:.3g}"
