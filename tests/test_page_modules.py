"""The page's files, and the logic of its scripts, run in a browser: numbers, texts, events, histories.

What is marked `browser` needs Chromium: `make test-page`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server import Process

pytest_plugins = ("tests.browser",)
HOSTILE = "<script>document.title = 'taken'</script><img src=x>"
TEXT = "A title\n\n" + "She measured it, and nobody had asked. \n" * 60 + "It ended\n\nhere. " * 60
PAGE = Path(__file__).parent.parent / "src/longread/server/page"


def test_markup_has_no_script_or_style_of_its_own() -> None:
    html = (PAGE / "index.html").read_text()
    assert "style=" not in html
    assert "<style" not in html
    assert not re.search(r"\son\w+=", html)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))


def test_nothing_comes_from_elsewhere() -> None:
    for file in PAGE.iterdir():
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}[^\s\"')]*", file.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name


def test_text_is_never_made_markup() -> None:
    for file in PAGE.glob("*.js"):
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", file.read_text()
        )
        assert not found, (file.name, found)


def test_scripts_and_markup_know_each_other() -> None:
    ids = re.findall(r'\bid="([^"]+)"', (PAGE / "index.html").read_text())
    assert len(ids) == len(set(ids))
    for file in PAGE.glob("*.js"):
        text = file.read_text()
        assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= set(ids), file.name
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert (PAGE / name).exists(), (file.name, name)
        assert len(text.splitlines()) <= 350, file.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_borders_and_inks_stand_out(scheme: str) -> None:
    """WCAG 2.2: 4.5 : 1 for text, 3 : 1 for what shows where a control is, and for the lines of plots."""
    blocks = re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): #(\w{6})", blocks[scheme == "dark"]))
    assert len(blocks) == 2

    def light(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def ratio(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    wanted = {"strong-rule": 3.0, "focus": 3.0} | dict.fromkeys(
        ("ink", "soft", "learning", "frozen", "gained", "lost", "danger", "a", "b"), 4.5
    )
    found = {(name, on): ratio(name, on) for name in wanted for on in ("page", "sheet", "tint")}
    assert {pair: value for pair, value in found.items() if value < wanted[pair[0]]} == {}
    assert ratio("on-ink", "ink") >= 4.5
    assert ratio("on-ink", "danger") >= 4.5


@pytest.mark.browser
def test_figures(page_server: Process, visit: Callable[..., Any]) -> None:
    found = visit(page_server).evaluate(
        """async () => {
          const f = await import("/page/figures.js");
          return {
            count: f.formatCount(12840),
            loss: [f.formatLoss(1.6182), f.formatLoss(null), f.formatLoss(NaN), f.formatLoss(-0.5, 1)],
            signed: [f.formatSigned(0.31), f.formatSigned(-0.31), f.formatSigned(-0.0001), f.formatSigned(null)],
            bytes: [0, 1023, 1024, 361758720, 1536 * 2 ** 30].map(f.formatBytes),
            percent: [0, 0.0321, 0.5, 1, null].map(f.formatPercent),
            seconds: [0.25, 9.96, 59.6, 75, 120].map(f.formatSeconds), rate: [3.21, 99.96, 12345.6].map(f.formatRate),
            ticks: [f.ticks(0, 10, 5), f.ticks(0.9, 2.3, 6), f.ticks(3, 3, 4), f.ticks(-0.1, 0.3, 3)],
            tick: [[16000, 20000], [1500000, 2e6], [0, 2e6], [500, 900]].map(([x, most]) => f.formatTick(x, most)),
            level: [f.formatLevel(2, 0.5), f.formatLevel(20, 10), f.formatLevel(0.25, 0.05)],
            title: ["\\n  # A title, \\nand more", "x".repeat(99), "", HOSTILE].map((text) => f.titleOf(text)),
            file: ["The Book: of/../Depths", "…", "Überfahrt 2"].map(f.fileName),
            width: [f.binWidth(100, 200), f.binWidth(1000, 200), f.binWidth(200, 200)],
            smooth: f.smooth([1, null, 3], [1, 1, 1], 0.7),
            same: f.smooth([2, 2, 2, 2], [1, 5, 1, 9], 2), none: f.smooth([], [], 2),
            quantile: [f.quantile([3, 1, null, 2], 0.5), f.quantile([], 0.5)],
            apart: [f.apart([10, 12], 15, 0, 100), f.apart([98, 99], 15, 0, 100)],
            spread: [f.spread(5), f.spread(0), f.spread(1)],
            time: [[2026, 4, 9, 8, 5], [2026, 0, 31, 23, 59], [2024, 11, 1, 12, 0]].map((then) =>
              f.formatTime(new Date(...then) / 1000, new Date(2026, 4, 9, 23, 0) / 1000)),
            never: f.formatTime(undefined),
          };
        }""".replace("HOSTILE", json.dumps(HOSTILE))
    )
    assert found["count"] == "12,840"
    assert found["loss"] == ["1.618", "–", "–", "−0.5"]
    assert found["signed"] == ["+0.310", "−0.310", "0.000", "–"]
    assert found["bytes"] == ["0 bytes", "1,023 bytes", "1.0 KiB", "345 MiB", "1.5 TiB"]
    assert found["percent"] == ["0 %", "3.2 %", "50 %", "100 %", "–"]
    assert found["seconds"] == ["0.3 s", "10 s", "1 min", "1 min 15 s", "2 min"]
    assert found["rate"] == ["3.2", "100", "12,346"]
    assert found["ticks"][0] == [0, 2, 4, 6, 8, 10]
    assert found["ticks"][1] == pytest.approx([1.0, 1.5, 2.0])
    assert found["ticks"][2] == [3]
    assert found["ticks"][3] == pytest.approx([0, 0.2])
    assert found["tick"] == ["16K", "1.5M", "0", "500"]
    assert found["level"] == ["2.0", "20", "0.25"]
    assert found["title"] == ["A title", "x" * 48 + " …", "", "script>document.title = 'taken'</script><img …"]
    assert found["file"] == ["The-Book-of-Depths.session", "session.session", "Überfahrt-2.session"]
    assert found["width"] == [1, 8, 1]
    assert found["smooth"][1] is None
    assert 1 < found["smooth"][0] < found["smooth"][2] < 3
    assert found["same"] == pytest.approx([2, 2, 2, 2])
    assert found["none"] == []
    assert found["quantile"] == [2, None]
    assert found["apart"] == [[10, 25], [85, 100]]
    assert found["time"] == ["08:05", "31 Jan, 23:59", "1 Dec 2024"]
    assert found["never"] == "–"
    assert found["spread"] == [[0, 4, 2, 1, 3], [], [0]]


@pytest.mark.browser
def test_texts_are_cut_without_loss(page_server: Process, visit: Callable[..., Any]) -> None:
    texts = [TEXT, "word " * 500, "a" * 3000, "𝄞" * 1500, "\n\n\n", "x", "é ü\n" * 300, " \u2003" * 900]
    found = visit(page_server).evaluate(
        """async (texts) => {
          const { pieces, passages } = await import("/page/figures.js");
          const whole = (parts) => parts.every((part) => !/[\\uD800-\\uDBFF]$/.test(part) && part.length);
          return texts.map((text) => {
            const [cut, read] = [[...pieces(text, 101)], passages(text)];
            return [cut.join("") === text, read.join("") === text, whole(cut), whole(read),
                    Math.max(...cut.map((part) => part.length)), Math.max(...read.map((part) => part.length))];
          });
        }""",
        texts,
    )
    for *sound, longest_piece, longest_passage in found:
        assert sound == [True] * 4
        assert longest_piece <= 101
        assert longest_passage <= 420 + 60


@pytest.mark.browser
def test_events_in_pieces(page_server: Process, visit: Callable[..., Any]) -> None:
    stream = 'event: progress\r\ndata: {"a":1}\r\n\r\n: alive\n\ndata: x\ndata: y\n\nevent: done\rdata: {}\r\rdata: cut'
    found = visit(page_server).evaluate(
        """async (stream) => {
          const { EventParser } = await import("/page/events.js");
          return [1, 2, 3, 7, 1000].map((size) => {
            const parser = new EventParser();
            const found = [];
            for (let at = 0; at < stream.length; at += size) found.push(...parser.push(stream.slice(at, at + size)));
            return found;
          });
        }""",
        stream,
    )
    wanted = [("progress", '{"a":1}'), ("message", "x\ny"), ("done", "{}")]
    for events in found:
        assert [(event["event"], event["data"]) for event in events] == wanted


@pytest.mark.browser
def test_history(page_server: Process, visit: Callable[..., Any]) -> None:
    found = visit(page_server).evaluate(
        """async () => {
          const { History, resample } = await import("/page/history.js");
          const h = new History(0);
          h.expect("aé bc");
          const bins = (start, tokens, bytes, nll, frozen_nll) => h.add({ start, tokens, bytes, nll, frozen_nll });
          bins([0, 1, 2, 3], [1, 1, 1, 1], [0, 1, 1, 1], [null, 1, 2, 3], [null, 2, 2, 5]);
          bins([3, 4], [1, 2], [1, 3], [9, 4], [9, 6]);  // position 3 was told before
          const { covered, position } = h;
          const read = { text: h.text(), covered, position, recent: h.recent(), mean: h.meanOfBytes(3, 99) };
          h.settle(7);
          h.addWritten(7, 0, "z");
          h.addWritten(7, 2, "zz");
          const fork = h.copy();
          h.expect("lost");
          h.settle(9, false);
          fork.expect("more");
          fork.settle(12);
          return { read, text: h.text(), written: h.written, position: h.position, fork: [fork.text(), fork.position],
                   parts: [h.slice(0, 2), h.slice(2, 4), h.around(2, 9, 9)], at: [-1, 0, 2, 5, 99].map((x) => h.at(x)),
                   bins: resample(h, 4).map((bin) => [bin.start, bin.end, bin.nll, bin.frozen, bin.gain]) };
        }"""
    )
    assert found["read"]["text"] == "aé bc"
    assert (found["read"]["covered"], found["read"]["position"]) == (6, 6)
    assert found["read"]["recent"] == {"nll": 14 / 5, "frozen": 21 / 5, "gain": pytest.approx(7 / 5), "tokens": 5}
    assert found["read"]["mean"] == {"position": 4, "nll": 4, "frozen": 6, "gain": 2, "tokens": 2}
    assert found["text"] == "aé bczzz"
    assert found["written"] == [[7, 9]]
    assert found["fork"] == ["aé bczzzmore", 12]
    assert found["parts"][:2] == ["a", " "]  # of a character in two halves nothing is shown
    assert found["at"] == [-1, 0, 2, 4, 6]
    assert found["bins"][0] == [0, 4, 2, 3, 1]
    assert found["bins"][1] == [4, 9, 4, 6, 2]


@pytest.mark.browser
def test_history_that_the_server_kept(page_server: Process, visit: Callable[..., Any]) -> None:
    found = visit(page_server).evaluate(
        """async () => {
          const { History } = await import("/page/history.js");
          const bins = { start: [0, 4, 8, 12, 16], tokens: [4, 4, 4, 4, 2], nll: [3, 2, null, null, 1],
                         frozen_nll: [3, 4, null, null, 2], scored: [3, 4, 0, 0, 1], written: [0, 0, 4, 4, 1] };
          const h = History.kept({ ...bins }, 20);
          const { first, position, written } = h;
          const mean = h.recent();
          const before = h.around(5);
          h.expect("and on");
          h.add({ start: [20, 21], tokens: [1, 1], bytes: [3, 3], nll: [5, 7], frozen_nll: null });
          const none = History.kept({ start: [], tokens: [], nll: [], frozen_nll: null, scored: [], written: [] }, 9);
          return { first, position, written, mean, before, text: h.text(), there: h.around(21),
                   of: h.meanOfBytes(0, 99), none: [none.first, none.position, none.length] };
        }"""
    )
    assert (found["first"], found["position"], found["written"]) == (0, 20, [[8, 18]])
    assert found["mean"] == {"nll": 18 / 8, "frozen": 27 / 8, "gain": pytest.approx(9 / 8), "tokens": 8}
    assert found["before"] == ["", ""], "no text of it is here"
    assert found["text"] == "and on"
    assert found["there"] == ["and", " on"]
    assert found["of"]["nll"] == 6, "only what this tab has seen"
    assert found["none"] == [9, 9, 0]
