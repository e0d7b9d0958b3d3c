"""What the tests of the page share: a server, a browser, and a visit that notices complaints and foreign addresses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server import Process

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]

FAINT_BORDERS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parsed = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], ground) => [r, g, b].map((c, i) => (c * a + ground[i] * (255 - a)) / 255);
  const ground = (e) =>
    e ? over(parsed(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255];
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const edges = (e) => {
    const style = getComputedStyle(e), outside = ground(e.parentElement);
    return ["Top", "Right", "Bottom", "Left"]
      .filter((side) => parseFloat(style[`border${side}Width`]) > 0 && parsed(style[`border${side}Color`])[3] > 0)
      .map((side) => ratio(over(parsed(style[`border${side}Color`]), outside), outside));
  };
  const field = "input:not([type=checkbox], [type=range], [type=file]), select, textarea";
  return [...document.querySelectorAll(`button, ${field}`)]
    .filter((e) => e.checkVisibility() && !e.disabled)
    .map((e) => {
      const drawn = edges(e).length ? edges(e) : e.matches(field) ? edges(e.closest(".sheet") ?? e) : [];
      const least = Math.min(...drawn);
      const fault = drawn.length ? least < 3 : e.matches(field);
      return fault ? `${e.id || e.textContent}: ${drawn.length ? least.toFixed(2) : "none"}` : null;
    })
    .filter(Boolean);
}"""
"""The controls whose border is not 3 : 1 on what is around them, and fields that have none."""


def faults(page: Any) -> list[str]:
    """What axe finds wrong with the page as it is shown, and borders of controls that are too faint."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page).response
    found = [f"{rule['id']}: {node['target']}" for rule in results["violations"] for node in rule["nodes"]]
    return found + [f"border: {control}" for control in page.evaluate(FAINT_BORDERS)]


@pytest.fixture(scope="session")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(tmp_path_factory.mktemp("open")) as process:
        yield process


@pytest.fixture(scope="session")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(tmp_path_factory.mktemp("guarded"), keys=True) as process:
        yield process


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("LONGREAD_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing may have been complained about, and nothing asked of anybody else."""
    contexts, complaints, foreign = [], [], []

    def open_page(server: Process, *, refused: bool = False, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if not refused:  # the browser itself writes down every answer that is an error
            page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        local = (server.url, "blob:" + server.url)
        page.on("request", lambda request: request.url.startswith(local) or foreign.append(request.url))
        page.goto(server.url)
        page.locator("#compose" if not server.client.headers.get("authorization") else "#key-dialog[open]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []
