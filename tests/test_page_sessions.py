"""The page and the sessions of a server: told apart, found again after a reload, lost; and where the focus goes.

What is marked `browser` needs Chromium: `make test-page`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import faults
from tests.server import Process
from tests.test_page import TEXT, at, idle, read

pytest_plugins = ("tests.browser",)


def focus(page: Any) -> str:
    """What has the focus: an id, or the tag."""
    return str(page.evaluate("document.activeElement.id || document.activeElement.tagName"))


def curve(page: Any, line: str) -> str:
    return str(page.locator(f"#plot path.strong.{line}").get_attribute("d"))


def figures(page: Any) -> list[str]:
    return [page.inner_text(f"#figure-{name}") for name in ("position", "loss", "gain")]


@pytest.mark.browser
def test_curves_survive_a_reload(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page, TEXT[:1500])
    page.fill("#max-tokens", "200")
    page.fill("#seed", "3")
    page.click("#write")
    page.locator(".turn:not(.live) .note-line").wait_for()
    idle(page)
    before, lines = figures(page), [curve(page, line) for line in ("learning", "frozen")]
    page.reload()
    page.locator("#plot path.strong.frozen").wait_for()
    assert figures(page) == before
    assert all(len(re.findall("L", curve(page, line))) > 60 for line in ("learning", "frozen"))
    assert len(curve(page, "learning")) > len(lines[0]) / 3
    assert page.locator("#plot .shade").count() == 1
    assert not page.locator("#no-curve").is_visible()
    box = page.locator("#plot svg").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    assert re.match(r"at [\d,]+ · loss \d+\.\d\d · frozen", page.inner_text("#plot .readout"))
    assert page.inner_text("#under") == "This tab has not seen the text there."
    page.fill("#text", TEXT[1500:])
    page.click("#read")
    page.locator("#figure-position", has_text=f"{int(before[0].replace(',', '')) + len(TEXT) - 1500:,}").wait_for()
    idle(page)
    assert len(curve(page, "learning")) > 100
    assert page.locator(".passage").count() > 0


@pytest.mark.browser
def test_a_fork_and_another_tab_show_the_same_curve(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page, TEXT[:900])
    before = figures(page)
    page.click("#fork")
    page.locator("#identity", has_text="fork of").wait_for()
    assert page.locator(".passage").count() > 0, "and the fork's own tab still has the text"
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#plot path.strong.frozen").wait_for()
    assert figures(other) == before
    page_server.client.post(f"/v1/sessions/{page.url.partition('#')[2]}/append", json={"text": TEXT[900:1300]})
    other.evaluate("dispatchEvent(new Event('focus'))")
    other.locator("#figure-position", has_text=f"{1301:,}").wait_for()
    assert figures(other)[1] != before[1]


@pytest.mark.browser
@pytest.mark.parametrize("name", ["%", "%E0%A4%A", "%zz", "nobody", "compare-%", "a" * 500, "<b>", "%00"])
def test_an_address_that_names_nothing_is_said(page_server: Process, visit: Callable[..., Any], name: str) -> None:
    page = visit(page_server)
    page.evaluate("(name) => { location.hash = name; }", name)
    reached = "#compare-title" if name.startswith("compare") else "#hero"
    page.locator(reached).wait_for()
    if reached == "#hero":
        page.locator("#alerts p", has_text="There is no session").wait_for()
    page.reload()
    page.locator(reached).wait_for()
    page.locator("#model", has_text="tiny").wait_for()
    page.click("#new")
    read(page, TEXT[:300])
    assert at(page) == 301


@pytest.mark.browser
def test_sessions_with_one_name_can_be_told_apart(page_server: Process, visit: Callable[..., Any]) -> None:
    client = page_server.client
    ids = [client.post("/v1/sessions", json={"label": "Twice"}).json()["id"] for _ in range(2)]
    ids.append(client.post(f"/v1/sessions/{ids[0]}/fork", json={"label": "Twice"}).json()["id"])
    page = visit(page_server)
    rows = [page.locator(f'#sessions button[data-id="{session}"]') for session in ids]
    words = [row.inner_text() for row in rows]
    for session, text in zip(ids, words, strict=True):
        assert re.search(rf"\d\d:\d\d · {session[:8]}", text)
    assert f"fork of Twice, {ids[0][:8]}" in words[2]
    assert "fork of" not in words[0] + words[1]
    rows[2].click()
    page.locator("#identity", has_text=f"Session {ids[2]}").wait_for()
    assert f"fork of Twice, {ids[0][:8]}" in page.inner_text("#identity")
    page.click("#compare-this")
    options = page.locator("#compare-a option").all_text_contents()
    assert len(set(options)) == len(options) > 2
    assert ids[0][:8] in page.locator("#compare-facts tr", has_text="Origin").inner_text()


@pytest.fixture
def damaged_server(tmp_path: Path) -> Iterator[Process]:
    """A server two of whose sessions are lost, one of them but for its beginning."""
    with Process(tmp_path) as process:
        client = process.client
        ids = [client.post("/v1/sessions", json={"label": label}).json()["id"] for label in ("whole", "gone", "half")]
        for session in ids:
            client.post(f"/v1/sessions/{session}/append", json={"text": TEXT[:100]})
        client.post(f"/v1/sessions/{ids[2]}/append", json={"text": TEXT[100:200]})
        process.stop(signal.SIGKILL)
    sessions = tmp_path / "sessions" / "sessions"
    (sessions / ids[1] / "session.db").write_text("no database")
    with contextlib.closing(sqlite3.connect(sessions / ids[2] / "session.db")) as database, database:
        database.execute("UPDATE event SET body = 'damaged' WHERE number = 2")
    with Process(tmp_path) as process:
        process.ids = ids  # type: ignore[attr-defined]
        yield process


@pytest.mark.browser
def test_what_is_lost_is_shown_with_its_reason(damaged_server: Process, visit: Callable[..., Any]) -> None:
    _, gone, half = damaged_server.ids  # type: ignore[attr-defined]
    page = visit(damaged_server)
    page.locator("#lost-sessions li").nth(1).wait_for()
    shown = {text[:4]: text for text in page.locator("#lost-sessions li").all_inner_texts()}
    assert re.match(rf"{gone[:8]}: it is lost, and had read \d+ tokens\. .*damaged", shown[gone[:4]])
    assert re.match(rf"half, {half[:8]}: what it read after its first 101 tokens is lost\. .*damaged", shown["half"])
    assert len(shown) == 2
    assert faults(page) == []
    page.click(f'#sessions button[data-id="{half}"]')
    page.locator("#loss", has_text="Of this session what it read after its first 101 tokens is lost.").wait_for()
    page.evaluate("(id) => { location.hash = id; }", gone)
    page.locator("#alerts p", has_text=f"Of session {gone[:8]} nothing is left").wait_for()
    page.click("#sessions button >> nth=0")
    assert page.locator("#alerts p").count() == 0


@pytest.mark.browser
def test_the_focus_stays_where_the_work_is(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    page.fill("#text", TEXT)
    page.focus("#read")
    page.keyboard.press("Enter")
    page.locator("#head").wait_for()
    idle(page)
    assert focus(page) == "watch-title", "what was read"
    page.fill("#max-tokens", "20")
    page.focus("#write")
    page.keyboard.press("Enter")
    page.locator(".turn:not(.live) .note-line").wait_for()
    idle(page)
    assert focus(page) == "write"
    page.route("**/score", lambda route: route.abort())
    page.focus("#label")
    page.keyboard.press("Tab")
    assert focus(page) == "fork"
    page.keyboard.press("Enter")
    page.locator("#identity", has_text="fork of").wait_for()
    assert focus(page) == "fork"
    page.click("#delete")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#hero").wait_for()
    assert focus(page) == "H1"


@pytest.mark.browser
def test_the_focus_survives_what_is_put_away(page_server: Process, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(page_server)
    page.locator("#model", has_text="tiny").wait_for()
    (tmp_path / "a.txt").write_text("A text.")
    page.set_input_files("#file", tmp_path / "a.txt")
    page.focus("#chip-remove")
    page.keyboard.press("Enter")
    assert focus(page) == "text"
    page.focus("#read")
    page.keyboard.press("Enter")
    dismiss = page.locator("#alerts button")
    dismiss.focus()
    page.keyboard.press("Enter")
    assert focus(page) == "H1"
    ids = [page_server.client.post("/v1/sessions", json={"label": name}).json()["id"] for name in ("earlier", "later")]
    page.evaluate("dispatchEvent(new Event('focus'))")
    row = page.locator(f'#sessions button[data-id="{ids[0]}"]')
    row.focus()
    page_server.client.post(f"/v1/sessions/{ids[0]}/append", json={"text": "it moves to the top"})
    page.evaluate("dispatchEvent(new Event('focus'))")
    page.locator("#sessions li >> nth=0").get_by_text("earlier").wait_for()
    assert page.evaluate("document.activeElement.dataset.id") == ids[0], "and not what took its place"
    page.set_viewport_size({"width": 420, "height": 800})
    page.click("#toggle-list")
    page.focus(f'#sessions button[data-id="{ids[1]}"]')
    page.keyboard.press("Enter")
    page.locator("#identity", has_text=ids[1]).wait_for()
    assert focus(page) == "heading"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_control_has_a_border_that_is_seen(page_server: Process, visit: Callable[..., Any], scheme: str) -> None:
    """Text fields, choices and buttons that have a border at all: 3 : 1 against the page."""
    page = visit(page_server, color_scheme=scheme)
    read(page, TEXT[:600])
    found = []
    for place in ("", "#compare"):
        if place:
            page.click("#open-compare")
        found += page.evaluate(
            """() => {
              const parts = (color) => color.match(/[\\d.]+/g).map(Number);
              const light = (color) => {
                const [r, g, b] = parts(color).slice(0, 3).map((c) => c / 255)
                  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const page = light(getComputedStyle(document.body).backgroundColor);
              return [...document.querySelectorAll("main button, main input, main select, main textarea, .sheet")]
                .filter((e) => e.checkVisibility() && !e.disabled && !["range", "checkbox"].includes(e.type))
                .map((e) => [e, getComputedStyle(e)])
                .filter(([, s]) => parseFloat(s.borderTopWidth) && parts(s.borderTopColor)[3] !== 0)
                .map(([e, s]) => [e.id, light(s.borderTopColor)])
                .map(([id, l]) => [id, (Math.max(l, page) + 0.05) / (Math.min(l, page) + 0.05)]);
            }"""
        )
    assert len(found) > 15
    assert [pair for pair in found if pair[1] < 3] == []
