"""Tables keep every name and figure at any width; charts can be read on a telephone; a page names its inputs."""

from __future__ import annotations

import io
import re
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from longread.checkpoint import save_model
from longread.cli import main
from longread.cli.outputs import listed
from longread.config import InnerConfig, ModelConfig
from longread.evaluate import Grid
from longread.evaluate.chart import LABEL_CHARACTER, Line, line_chart
from longread.evaluate.figures import print_grid
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


def drawings() -> tuple[str, str, str]:
    html = line_chart(LINES, title="Loss", x_label="position", y_label="nats per token")
    wide, narrow = re.findall(r"<svg class=.*?</svg>", html, re.DOTALL)
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
    assert legend.count("stroke-dasharray") == 1
    style = (Path(line_chart.__code__.co_filename).parent / "report.css").read_text()
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
            assert x + LABEL_CHARACTER * len(label) <= width
        for points in re.findall(r'points="([^"]*)"', svg):
            assert all(0 < float(point.partition(",")[0]) < width for point in points.split())
    labels = [label for _, label in texts(drawings()[0], "label")]
    assert sorted(labels, key=len)[0] == "short, learning"
    assert re.fullmatch("a-run-with-a-name.*….*seeds-1-2-3, frozen", max(labels, key=len))


@pytest.mark.parametrize("size", range(1, 41))
def test_a_name_that_has_room_is_whole(size: int) -> None:
    html = line_chart([Line("n" * size, [(1.0, 2.0), (3.0, 4.0)])], title="", x_label="", y_label="")
    assert [label for _, label in texts(html, "label")] == ["n" * size]


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
