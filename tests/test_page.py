"""The page in a browser, against the real server: reading, asking, forking, keeping, comparing; and what goes wrong.

What is marked `browser` needs Chromium: `make test-page`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser import faults
from tests.server import ALICE, Process

pytest_plugins = ("tests.browser",)
TEXT = "The Book of Depths\n\n" + "\n\n".join(
    f"On day {i} the pilot measured {i * i % 37} feet at the pier. Nobody had asked her to, and she wrote it down."
    for i in range(40)
)
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> & so on"


def read(page: Any, text: str = TEXT) -> None:
    page.fill("#text", text)
    page.click("#read")
    page.locator("#head").wait_for()
    idle(page)


def idle(page: Any) -> None:
    """Waits until the session neither reads nor writes nor is shown passages."""
    page.locator("#fork:enabled").wait_for()
    page.locator("#measured", has_text="passages").wait_for()


def at(page: Any) -> int:
    return int(page.inner_text("#figure-position").replace(",", ""))


@pytest.mark.browser
def test_reading_is_watched(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    assert page.inner_text("h1") == "A reader that learns while it reads"
    read(page)
    assert page.input_value("#label") == "The Book of Depths"
    assert at(page) == 1 + len(TEXT.encode())
    assert float(page.inner_text("#figure-loss")) == pytest.approx(5.5, abs=0.6)
    assert re.fullmatch(r"[+−]?\d\.\d{3}", page.inner_text("#figure-gain"))
    assert page.inner_text("#figure-rate") != "–"
    for line in ("learning", "frozen"):
        path = page.locator(f"#plot path.strong.{line}").get_attribute("d")
        assert len(re.findall("L", path)) > 60
    assert page.locator("#plot .name").all_text_contents() == ["frozen", "learning"]
    titles = page.locator("#plot .panel-title").all_text_contents()
    assert [title.split(",")[0].split(":")[0] for title in titles] == ["Loss", "Gain over frozen reading", "Kept"]
    assert page.locator("#plot .axis-title").text_content() == "Position, tokens →"
    assert "mean" in page.locator("#plot svg").get_attribute("aria-label")
    page.click("#numbers summary")
    page.locator("#rows tr").first.wait_for()
    assert page.locator("#rows tr").count() > 8
    assert page.locator("#rows tr").first.inner_text().startswith("0–")


@pytest.mark.browser
def test_losses_are_the_servers(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page)
    created = page_server.client.post("/v1/sessions", json={"compare": True}).json()
    whole = page_server.client.post(f"/v1/sessions/{created['id']}/append", json={"text": TEXT}).json()
    assert page.inner_text("#figure-loss") == f"{whole['nll']:.3f}"
    assert page.inner_text("#figure-gain").lstrip("+").replace("−", "-") == f"{whole['gain']:.3f}"
    page_server.client.delete(f"/v1/sessions/{created['id']}")


@pytest.mark.browser
def test_passages_are_shown_again(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page)
    rows = page.locator(".passage")
    assert rows.count() == 8
    changes = [float(text.replace("−", "-")) for text in page.locator(".passage .values b").all_inner_texts()]
    assert changes == sorted(changes)
    page.click("#order-least")
    assert page.get_attribute("#order-least", "aria-pressed") == "true"
    least = [float(text.replace("−", "-")) for text in page.locator(".passage .values b").all_inner_texts()]
    assert least == sorted(least, reverse=True)
    page.click("#order-text")
    words = [" ".join(text.split()) for text in page.locator(".passage .words").all_inner_texts()]
    assert " ".join(TEXT.split()).startswith(words[0].rstrip(" …")[:60])
    rows.first.hover()
    page.locator("#plot .kept.chosen").wait_for()
    assert re.match(r"at [\d,]+ · loss \d", page.inner_text("#plot .readout"))


@pytest.mark.browser
def test_cursor_by_pointer_and_keyboard(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page)
    box = page.locator("#plot svg").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 100)
    assert re.match(r"at [\d,]+ · loss \d+\.\d\d · frozen \d+\.\d\d · gain [+−]?\d", page.inner_text("#plot .readout"))
    assert page.inner_text("#under mark") in TEXT
    page.mouse.move(0, 0)
    assert page.inner_text("#plot .readout") == ""
    slider = page.get_by_role("slider", name="Position in the text")
    slider.focus()
    slider.press("End")
    last = slider.get_attribute("aria-valuetext")
    slider.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") != last
    assert slider.get_attribute("aria-valuetext").startswith("at ")


@pytest.mark.browser
def test_continue_and_ask_a_copy(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page)
    before = at(page)
    page.fill("#prompt", "Then ")
    page.fill("#max-tokens", "40")
    page.fill("#seed", "7")
    page.click("#write")
    page.locator(".turn:not(.live) .note-line", has_text="40 tokens").wait_for()
    idle(page)
    assert page.inner_text(".turn .prompt") == "Then "
    assert at(page) == before + len("Then ") + 40
    assert page.locator("#plot .shade").count() == 1
    page.check("#aside")
    page.fill("#max-tokens", "10")
    page.click("#write")
    page.locator(".turn:not(.live) .note-line", has_text="by a copy · 10 tokens").wait_for()
    idle(page)
    assert at(page) == before + len("Then ") + 40
    assert not any("(asked)" in session["label"] for session in page_server.client.get("/v1/sessions").json()["data"])


@pytest.mark.browser
def test_fork_save_restore_delete(page_server: Process, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(page_server)
    read(page)
    page.click("#fork")
    page.locator("#sessions [aria-current] .who", has_text="The Book of Depths, fork").wait_for()
    assert page.input_value("#label") == "The Book of Depths, fork"
    assert page.locator("#plot path.strong.learning").count() == 1  # the fork has seen the same
    page.fill("#label", "A branch")
    page.press("#label", "Enter")
    page.locator("#sessions [aria-current] .who", has_text="A branch").wait_for()
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "A-branch.session"
    file = tmp_path / "A-branch.session"
    download.value.save_as(file)
    assert file.stat().st_size > 1000
    position = at(page)
    page.click("#delete")
    page.click("#delete-cancel")
    page.click("#delete")
    page.click("#delete-confirm")
    page.locator("#hero").wait_for()
    assert page.locator("#sessions .who", has_text="A branch").count() == 0
    page.set_input_files("#restore-file", file)
    page.locator("#head").wait_for()
    assert page.input_value("#label") == "A-branch"
    assert f"{position:,} tokens" in page.inner_text("#facts")
    page.locator("#no-curve").wait_for()
    page.reload()
    page.locator("#head").wait_for()
    assert page.input_value("#label") == "A-branch"


@pytest.mark.browser
def test_compare(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page, TEXT[:900])
    page.click("#new")
    read(page, TEXT[900:2000])
    page.click("#compare-this")
    a, b = page.input_value("#compare-a"), page.input_value("#compare-b")
    assert a
    assert a != b
    page.fill("#probe-text", TEXT[:400])
    page.click("#probe-go")
    page.locator("#probe-plot path.strong.b").wait_for()
    assert re.fullmatch(
        r"A \d\.\d{3}, B \d\.\d{3} nats per token; B − A [+−]?\d\.\d{3}", page.inner_text("#probe-facts")
    )
    positions = [page_server.client.get(f"/v1/sessions/{session}").json()["position"] for session in (a, b)]
    page.fill("#both-tokens", "15")
    page.click("#both-go")
    for side in "ab":
        page.locator(f"#output-{side} .note-line", has_text="15 tokens").wait_for()
    page.locator("#both-go:enabled").wait_for()
    assert positions == [page_server.client.get(f"/v1/sessions/{session}").json()["position"] for session in (a, b)]
    page.go_back()
    page.locator("#head").wait_for()


@pytest.mark.browser
def test_hostile_text_is_text(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    read(page, f"{HOSTILE}\n\n" * 30)
    page.fill("#label", HOSTILE)
    page.press("#label", "Enter")
    page.locator("#sessions .who", has_text=HOSTILE).first.wait_for()
    events = [
        ("token", {"text": HOSTILE, "tokens": [1], "position": 9999, "logprobs": None}),
        ("done", {"finish_reason": "stop", "position": 9999, "tokens": [1], "tokens_per_second": 3.0}),
    ]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page.route("**/generate", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.fill("#prompt", HOSTILE)
    page.click("#write")
    page.locator(".turn:not(.live) .note-line", has_text="it came to an end").wait_for()
    assert page.inner_text(".turn .wrote") == HOSTILE
    assert page.inner_text(".turn .prompt") == HOSTILE
    assert HOSTILE in page.locator(".passage .words").first.inner_text()
    box = page.locator("#plot svg").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    assert "<" in page.inner_text("#under")
    assert page.locator("main img, main script, #side img").count() == 0
    assert "taken" not in page.title().split(" · ")[0].split("'")[0]


@pytest.mark.browser
def test_stop_keeps_what_was_read(page_server: Process, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(page_server)
    (tmp_path / "long.txt").write_text(TEXT * 40)  # a browser takes long to lay out so much text in a field
    page.set_input_files("#file", tmp_path / "long.txt")
    page.locator("#chip").wait_for()
    page.click("#read")
    page.locator("#plot path.strong.learning").wait_for()
    page.click("#stop")
    idle(page)
    here = at(page)
    assert 0 < here < len(TEXT) * 40
    session = page.url.partition("#")[2]
    there = page_server.client.get(f"/v1/sessions/{session}").json()["position"]
    assert here == there
    page.fill("#text", " And then it went on.")
    page.click("#read")
    page.locator("#figure-position", has_text=f"{there + len(' And then it went on.'):,}").wait_for()
    idle(page)


@pytest.mark.browser
def test_key_is_asked_for_and_stays_in_the_tab(guarded_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(guarded_server, refused=True)
    page.fill("#key", "not-the-right-key")
    page.click("#key-save")
    page.locator("#key-dialog[open]").wait_for()
    page.fill("#key", ALICE)
    page.click("#key-save")
    page.locator("#model", has_text="tiny").wait_for()
    assert not page.locator("#key-dialog").is_visible()
    read(page, TEXT[:600])
    assert page.evaluate("Object.values(sessionStorage).join()") == ALICE
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""
    assert ALICE not in page.content() + page.url
    page.reload()
    page.locator("#head").wait_for()


@pytest.mark.browser
def test_what_goes_wrong_is_said(page_server: Process, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(page_server, refused=True)
    alert = page.locator("#alerts")
    page.click("#read")
    alert.get_by_text("There is no text yet").wait_for()
    for name, content, words in (
        ("picture.png", b"\x89PNG\xff\xfe", "picture.png is not UTF-8 text"),
        ("zeros.bin", b"a\0b", "zeros.bin is not a text"),
        ("empty.txt", b"", "empty.txt is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#file", tmp_path / name)
        alert.get_by_text(words).wait_for()
    (tmp_path / "broken.session").write_bytes(b"not a session at all")
    page.set_input_files("#restore-file", tmp_path / "broken.session")
    alert.locator("p").last.wait_for()
    refusal = alert.locator("p").last.inner_text()
    assert refusal.endswith(".")
    alert.get_by_role("button").last.click()
    page.route("**/v1/sessions", lambda route: route.abort())
    page.fill("#text", "A text.")
    page.click("#read")
    alert.get_by_text("The server cannot be reached").wait_for()


@pytest.mark.browser
def test_busy_server_is_waited_for(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server, refused=True)
    asked = []

    def busy(route: Any) -> None:
        asked.append(json.loads(route.request.post_data)["expected_position"])
        if len(asked) > 1:
            route.continue_()
        else:
            error = {"error": {"message": "there is no room now", "code": "busy"}}
            route.fulfill(status=503, json=error, headers={"Retry-After": "1"})

    page.route("**/append", busy)
    page.fill("#text", TEXT)
    page.click("#read")
    page.locator("#progress-text", has_text="The server is busy; trying again in 1 s").wait_for()
    idle(page)
    assert asked == [0, 0]
    assert at(page) == 1 + len(TEXT)


@pytest.mark.browser
def test_broken_connection_is_taken_up_again(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server, refused=True)
    broken = []

    def fail_once(route: Any) -> None:
        if broken:
            route.continue_()
        else:
            broken.append(route.request.url)
            route.abort()

    page.route("**/append", fail_once)
    read(page)
    assert broken
    assert at(page) == 1 + len(TEXT)
    assert page.locator("#alerts p").count() == 0


@pytest.mark.browser
def test_a_file_is_dropped(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server)
    page.evaluate(
        """(text) => {
          const data = new DataTransfer();
          data.items.add(new File([text], "depths.txt", { type: "text/plain" }));
          for (const name of ["dragover", "drop"]) {
            document.body.dispatchEvent(new DragEvent(name, { dataTransfer: data, bubbles: true, cancelable: true }));
          }
        }""",
        TEXT,
    )
    page.locator("#chip").wait_for()
    assert page.inner_text("#chip-name") == "depths.txt"
    page.keyboard.press("Enter")  # the focus is on "Read"
    page.locator("#head").wait_for()
    idle(page)
    assert page.input_value("#label") == "depths.txt"
    assert at(page) == 1 + len(TEXT)


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_fits_every_width(page_server: Process, visit: Callable[..., Any], width: int) -> None:
    page = visit(page_server, viewport={"width": width, "height": 740})

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = page.evaluate(
            """() => [...document.querySelectorAll("button, select, summary, input:not([type=range])")]
                .filter((e) => e.checkVisibility() && !e.closest("label.check"))
                .filter((e) => e.getBoundingClientRect().height < 24)
                .map((e) => e.id || e.textContent)"""
        )
        assert [name for name in small if name != "The same in numbers"] == []

    check()
    read(page)
    check()
    if width < 860:
        assert not page.locator("#open-compare").is_visible()
        page.click("#toggle-list")
        assert page.get_attribute("#toggle-list", "aria-expanded") == "true"
    page.click("#open-compare")
    page.locator("#compare-title").wait_for()
    check()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(page_server: Process, visit: Callable[..., Any], scheme: str) -> None:
    page = visit(page_server, color_scheme=scheme)
    ratios = page.evaluate(
        """() => {
          const style = getComputedStyle(document.documentElement);
          const light = (name) => {
            const hex = style.getPropertyValue(name).trim().slice(1);
            const [r, g, b] = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
              .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
          const found = {};
          for (const ink of ["--ink", "--soft", "--learning", "--frozen", "--lost", "--danger", "--a", "--b"]) {
            for (const ground of ["--page", "--sheet", "--tint"]) found[`${ink} on ${ground}`] = ratio(ink, ground);
          }
          found["button"] = ratio("--on-ink", "--ink");
          found["dark"] = light("--page") < 0.2;
          return found;
        }"""
    )
    assert ratios.pop("dark") == (scheme == "dark")
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(page_server: Process, visit: Callable[..., Any], scheme: str, width: int) -> None:
    page = visit(page_server, color_scheme=scheme, viewport={"width": width, "height": 844}, reduced_motion="reduce")
    page.locator("#hero").wait_for()
    assert faults(page) == []
    read(page, TEXT[:900])
    page.click("#numbers summary")
    page.fill("#max-tokens", "8")
    page.click("#write")
    page.locator(".turn:not(.live) .note-line").wait_for()
    idle(page)
    assert faults(page) == []
    page.click("#delete")
    assert faults(page) == []
    page.keyboard.press("Escape")
    page.click("#compare-this")
    page.fill("#probe-text", TEXT[:300])
    page.click("#probe-go")
    page.locator("#probe-plot path.strong.b").wait_for()
    assert faults(page) == []


@pytest.mark.browser
def test_everything_has_a_name_and_can_be_reached(page_server: Process, visit: Callable[..., Any]) -> None:
    page = visit(page_server, reduced_motion="reduce")
    read(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [role], section, aside, nav, form")]
            .filter((e) => e.checkVisibility() && e.type !== "file")
            .filter((e) => !(e.ariaLabel || e.getAttribute("aria-labelledby") || e.labels?.length))
            .filter((e) => !e.textContent.trim())
            .filter((e) => !["status", "alert"].includes(e.role) && !e.matches("section.view"))
            .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    page.locator(".skip").focus()
    assert page.locator(".skip").bounding_box()["y"] >= 0
    reached, unseen = set(), set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, seen = page.evaluate(
            """() => {
              const e = document.activeElement, frame = getComputedStyle(e.closest(".sheet, .plot") ?? e);
              const outlined = [getComputedStyle(e), frame].some((style) => style.outlineStyle !== "none");
              return [e.id || e.type, outlined || frame.boxShadow !== "none" || e === document.body];
            }"""
        )
        reached.add(name)
        if not seen:
            unseen.add(name)
    assert unseen == set()
    assert {
        "new",
        "label",
        "fork",
        "save",
        "delete",
        "range",
        "text",
        "read",
        "prompt",
        "write",
        "order-least",
    } <= reached
    page.click("#delete")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "delete"
    assert "Mean loss" in page.locator("#announcer").inner_text()
    assert page.evaluate("getComputedStyle(document.querySelector('button')).transitionDuration") == "0s"
