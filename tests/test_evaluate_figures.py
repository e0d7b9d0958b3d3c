"""Tables keep every name and figure at any width; charts can be read on a telephone; a page names its inputs."""

from __future__ import annotations

import io
import math
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from longread.checkpoint import save_model
from longread.cli import main
from longread.cli.outputs import listed
from longread.config import InnerConfig, ModelConfig
from longread.evaluate import Chart, Figures, Grid, Line, draw, figures_page, report, save_charts, to_svg
from longread.evaluate.drawing import CHARACTER, PALETTE, Drawing, Mark, Stroke, Words
from longread.evaluate.report import html_chart
from longread.evaluate.table import print_grid
from longread.model import Transformer, initialize
from longread.tokenizer import ByteTokenizer

NAMES = [f"a-run-with-a-long-name-{i} [seed {i}], {reading}" for i in range(3) for reading in ("learning", "frozen")]
CELLS = [[f"{i}.{j}23 ± 0.00{i} | {j}.456" for j in range(5)] for i in range(6)]
HEADINGS = [
    "parameters",
    "nats/token",
    "gain over frozen",
    "a-heading-that-is-longer-than-a-figure, frozen",
    "tokens/s",
]


def printed(grid: Grid, width: int) -> str:
    text = io.StringIO()
    print_grid(grid, Console(file=text, width=width, soft_wrap=True, color_system=None))
    return text.getvalue()


def columns(text: str) -> list[str]:
    """The contents of each column of each table, from top to bottom, without the breaks."""
    found: list[str] = []
    table: list[list[str]] = []
    for line in text.splitlines():
        if line[:1] in "┃│":
            table.append([cell.strip() for cell in re.split("[┃│]", line)[1:-1]])
        elif line.startswith("└"):
            found += ["".join(column).replace(" ", "") for column in zip(*table, strict=True)]
            table = []
    return found


@pytest.mark.parametrize("width", [40, 41, 60, 79, 100, 160, 400])
def test_a_table_loses_no_name_and_no_figure(width: int) -> None:
    text = printed(Grid("A title [x]", "model, reading", HEADINGS, list(zip(NAMES, CELLS, strict=True))), width)
    assert "A title [x]" in text
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines() if line[:1] in "┃│┏└")
    named = ["model,reading", *(name.replace(" ", "") for name in NAMES)]
    shown = [column for column in columns(text) if column != "".join(named)]
    assert shown == [
        "".join([heading, *(row[i] for row in CELLS)]).replace(" ", "") for i, heading in enumerate(HEADINGS)
    ]
    assert len(columns(text)) - len(shown) == text.count("└")  # each part has the names again
    if width == 400:
        assert text.count("└") == 1


def test_a_short_table_is_as_wide_as_it_has_to_be() -> None:
    text = printed(Grid("t", "T", ["a", "b"], [("1", ["2", "3"])]), 40)
    assert max(map(len, text.splitlines())) == len("│ 1 │ 2 │ 3 │")


LINES = [
    Line("short, learning", [(16.0, 3.0), (300.0, 2.9), (131072.0, 2.75)], [(2.9, 3.1), (2.8, 3.0), (2.7, 2.8)]),
    Line("a-run-with-a-name-of-sixty-characters <and> seeds-1-2-3, frozen", [(16.0, 3.1), (70000.0, 3.0)], dashed=True),
]
BELOW_ZERO = [Line("a", [(1.0, -0.0171), (2.0, -0.0177)])]


def drawings(lines: list[Line] = LINES) -> tuple[str, str, str]:
    html = html_chart(Chart("loss", "Loss", "position", "nats per token", lines))
    wide, narrow = re.findall(r'<svg class="chart (?:wide|narrow)".*?</svg>', html, re.DOTALL)
    return wide, narrow, html[html.index("<ul") :]


def texts(svg: str, kind: str) -> list[tuple[float, str]]:
    found = re.findall(rf'<text class="{kind}[^"]*" x="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    return [(float(x), unescape(text)) for x, text in found]


def test_a_narrow_drawing_has_its_own_sizes_and_a_legend() -> None:
    """At 420 px a chart has about 360 of them: the narrow drawing is shown in its own size, the wide one is not."""
    wide, narrow, legend = drawings()
    assert 'class="chart wide" viewBox="0 0 860 360"' in wide
    assert 'class="chart narrow" viewBox="0 0 360 260"' in narrow
    assert 'class="label' not in narrow
    assert re.findall(r"</svg>([^<]*)</li>", legend) == [line.label.replace("<and>", "&lt;and&gt;") for line in LINES]
    assert [swatch.count("stroke-dasharray") for swatch in legend.split("<li>")[1:]] == [0, 1]
    style = (Path(report.__file__).parent / "report.css").read_text()
    narrow_rules = style[style.index("@media (max-width: 760px)") :]
    assert ".chart.wide { display: none; }" in narrow_rules
    assert ".chart.narrow { display: block;" in narrow_rules
    assert ".chart.narrow, .legend { display: none; }" in style[: style.index("@media (max-width: 760px)")]


def test_nothing_covers_its_neighbour_or_leaves_the_drawing() -> None:
    for svg, width in zip(drawings()[:2], (860, 360), strict=True):
        ticks = [tick for tick in texts(svg, "tick") if re.search('text-anchor="middle">' + tick[1] + "<", svg)]
        assert len(ticks) >= 4
        for (left, one), (right, other) in pairwise(ticks):
            assert right - left > 7 * (len(one) + len(other)) / 2 + 4
        for x, label in texts(svg, "label"):
            assert x + CHARACTER * len(label) <= width
        paths = re.findall(r' d="M([^"a-zZ]*)', svg)
        assert len(paths) > 10
        for path in paths:
            assert all(0 < float(point.partition(",")[0]) < width for point in path.split("L"))
    labels = [label for _, label in texts(drawings()[0], "label")]
    assert sorted(labels, key=len)[0] == "short, learning"
    assert re.fullmatch("a-run-with-a-name.*….*seeds-1-2-3, frozen", max(labels, key=len))


@pytest.mark.parametrize("lines", [LINES, BELOW_ZERO])
def test_the_name_of_an_axis_stands_clear_of_its_numbers(lines: list[Line]) -> None:
    for svg in drawings(lines)[:2]:
        names = [(x, text) for x, text in texts(svg, "tick") if f'text-anchor="end">{text}<' in svg]
        assert len(names) >= 4
        (side,) = (x for x, text in texts(svg, "name") if text == "nats per token")
        assert all(3 < side < side + 4 < x - 7.2 * len(name) for x, name in names)


@pytest.mark.parametrize("size", range(1, 41))
def test_a_name_that_has_room_is_whole(size: int) -> None:
    html = html_chart(Chart("", "", "", "", [Line("n" * size, [(1.0, 2.0), (3.0, 4.0)])]))
    assert [label for _, label in texts(html, "label")] == ["n" * size]


def levels(drawing: Drawing) -> list[tuple[float, float]]:
    """The lines of the grid from the lowest: the value that is written beside each, and its height."""
    grid = [part.points[0] for part in drawing.parts if isinstance(part, Stroke) and part.kind == "grid"]
    words = [part for part in drawing.parts if isinstance(part, Words) and part.kind == "tick"]
    return [(float(word.text.replace("−", "-")), y) for x, y in grid for word in words if word.at == (x - 8, y + 4)]


@pytest.mark.parametrize("log_x", [True, False])
@pytest.mark.parametrize("points", [[(16.0, 3.0), (64.0, -2.0), (256.0, 2.75)], [(1.0, 0.5)], [(1.0, 2.0), (9.0, 2.0)]])
def test_a_point_lies_where_the_axes_say(points: list[tuple[float, float]], log_x: bool) -> None:
    drawing = draw([Chart("", "", "", "", [Line("a", points)], log_x=log_x)])
    (low, bottom), *_, (high, top) = levels(drawing)
    assert bottom > top
    marks = [part.at for part in drawing.parts if isinstance(part, Mark)]
    assert [low + (bottom - y) / (bottom - top) * (high - low) for _, y in marks] == pytest.approx(
        [y for _, y in points]
    )
    ticks = {part.text: part.at[0] for part in drawing.parts if isinstance(part, Words) and part.anchor == "middle"}
    assert [x for x, _ in marks] == pytest.approx([ticks[f"{x:g}"] for x, _ in points])
    if len(points) == 3:
        (first, second, third), middle = (x for x, _ in marks), 1 / 2 if log_x else 48 / 240
        assert second == pytest.approx(first + middle * (third - first))


def test_what_is_beyond_the_limits_is_drawn_at_them_and_what_is_infinite_not_at_all() -> None:
    points = [(1.0, 1.0), (2.0, 9.0), (4.0, math.inf), (8.0, 2.0)]
    lines = [Line("a", points), Line("lost", [(1.0, math.nan)])]
    drawing = draw([Chart("", "", "", "", lines, limits=(0.0, 4.0))])
    assert [value for value, _ in levels(drawing)] == [0, 1, 2, 3, 4]
    heights = dict(levels(drawing))
    assert [part.at[1] for part in drawing.parts if isinstance(part, Mark)] == [heights[1], heights[4], heights[2]]
    assert not any(isinstance(part, Words) and part.text == "lost" for part in drawing.parts)
    assert html_chart(Chart("", "", "", "", lines[1:])) == ""


def test_charts_stand_side_by_side_each_with_its_title_and_axes() -> None:
    charts = [Chart("", title, "x", "y", LINES) for title in ("one", "two", "three")]
    drawing = draw(charts, width=1500, titles=True)
    titles = {part.text: part.at[0] for part in drawing.parts if isinstance(part, Words) and part.kind == "title"}
    assert list(titles) == ["one", "two", "three"]
    starts = [0.0, *list(titles.values())[1:], 1500.0]
    marks = [part.at[0] for part in drawing.parts if isinstance(part, Mark)]
    assert [sum(a <= x < b for x in marks) for a, b in pairwise(starts)] == [5, 5, 5]
    wrapped = draw(charts, columns=2, titles=True)
    places = [part.at for part in wrapped.parts if isinstance(part, Words) and part.kind == "title"]
    assert places == [(56, 20), (486, 20), (56, wrapped.height / 2 + 20)]
    named = draw(charts, width=1500, names="above").parts
    labels = [part.text for part in named if isinstance(part, Words) and part.kind == "label"]
    assert labels == [line.label for line in LINES], "once for all charts"


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
                   for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", [name for name in PALETTE if name != "rule"])
def test_words_and_lines_can_be_read_on_light_and_dark_ground(name: str) -> None:
    """The page's cards, white paper, and the dark of GitHub."""
    style = (Path(report.__file__).parent / "report.css").read_text()
    (light, dark) = re.findall("--card: (#[0-9a-f]{6})", style)
    assert min(contrast(PALETTE[name][0], ground) for ground in (light, "#ffffff")) >= 4.5
    assert min(contrast(PALETTE[name][1], ground) for ground in (dark, "#0d1117")) >= 4.5


def test_a_file_has_its_colours_with_it_and_a_page_has_them_once() -> None:
    chart = Chart("loss", "Loss & more", "position", "nats", LINES)
    alone = to_svg(draw([chart]), alone=True)
    root = ElementTree.fromstring(alone)
    assert root.findtext("{http://www.w3.org/2000/svg}title") == root.get("aria-label") == "Loss & more"
    page = figures_page(Figures([], [chart, chart]), title="t", lead="l")
    for text in (alone, page):
        assert [text.count(f"--c0: {color}") for color in PALETTE["c0"]] == [1, 1]
        used = set(re.findall(r'<(?:path|text|circle) class="\w+ (\w+)"', text))
        assert used == {"c0", "soft", "rule"}
        assert "http" not in text.replace("http://www.w3.org", "")


def test_a_png_is_the_same_drawing(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    chart = Chart("loss", "Loss", "position", "nats", [Line("a", [(1.0, 3.0), (9.0, 1.0)], color=4)], log_x=False)
    (path,) = save_charts([chart], tmp_path / "plots")
    drawing, pixels = draw([chart]), image.imread(path)
    assert pixels.shape[:2] == (2 * drawing.height, 2 * drawing.width)
    red = [int(PALETTE["c4"][0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    marks = [part.at for part in drawing.parts if isinstance(part, Mark)]
    assert len(marks) == 2
    for x, y in marks:
        assert pixels[int(2 * y), int(2 * x), :3] == pytest.approx(red, abs=0.02)
    assert pixels[4, 4, :3] == pytest.approx([1, 1, 1])


def test_the_best_of_a_row_stands_out_everywhere() -> None:
    rows = [("1", ["2.0 ± 0.1", "3.0 | 9.0"]), ("2", ["5.0", "4.0 | 9.1"]), ("3", ["6.0", "6.0"])]
    grid = Grid("t", "T", ["a", "b"], rows, best=[{0}, {1}, {0, 1}])
    text = io.StringIO()
    print_grid(grid, Console(file=text, width=80, force_terminal=True, color_system="standard"))
    assert re.findall(r"\x1b\[1m(\d\.\d[^\x1b]*)\x1b", text.getvalue()) == ["2.0 ± 0.1", "4.0 | 9.1", "6.0", "6.0"]
    page = figures_page(Figures([grid]), title="t", lead="l")
    shown = ['2.0 <span class="ci">± 0.1</span>', '4.0 <span class="ci">| 9.1</span>', "6.0", "6.0"]
    assert re.findall(r'<td class="best">(.*?)</td>', page) == shown


def test_many_inputs_are_named_and_the_rest_counted() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([str(i) for i in range(8)]) == "0, 1, 2, 3, 4, 5, 6 and 7"
    assert listed([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6 and 13 more"


def test_the_lead_names_every_input(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=257, width=16, num_blocks=2, num_heads=2, mlp_hidden=24, window_size=16, mini_batch_size=8
    )
    for name in ("one", "other"):
        model = Transformer(config)
        initialize(model, seed=1)
        save_model(tmp_path / name, model, InnerConfig(), tokenizer_fingerprint=ByteTokenizer.fingerprint)
        ByteTokenizer().save(tmp_path / name)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("A text of a few words.")
    inputs = [str(tmp_path / name) for name in ("one", "other", "a.txt", "b.txt")]
    page = str(tmp_path / "page.html")
    assert main(["evaluate", *inputs[:2], "--data", *inputs[2:], "--device", "cpu", "--report", page]) == 0
    lead = re.findall('<p class="lead">([^<]*)</p>', Path(page).read_text())
    assert lead == [f"{inputs[0]} and {inputs[1]} on {inputs[2]} and {inputs[3]}."]
