"""Outer and inner rates of the baselines, 200 steps each; those of TTT-E2E are of the page on stability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.pages import NAMES
from experiments.plan import RATES
from experiments.results import Results

from longread.evaluate import Chart, Line

SLUG = "rates"
HEADING = """# Which rates suit the baselines?

Are the recipe's the best for each method?"""
NEEDS = ("rate-swa-3e-3", "rate-full-3e-3")
OUTER = ("1e-3", "3e-3", "1e-2")
INNER = ("0.1", "0.3", "1", "3", "no clip")
FAILED = "failed"
_OF_OUTER = {"e2e": {"1e-3": "stable-lr-1e-3", "3e-3": "stable-base", "1e-2": "stable-lr-1e-2"}} | {
    method: {rate: f"rate-{method}-{rate}" for rate in OUTER} for method in RATES
}
_OF_INNER = {
    "e2e": {rate: f"stable-inner-lr-{rate}" for rate in INNER}
    | {"1": "stable-base", "no clip": "stable-no-inner-clip"},
    "kvb": {rate: f"rate-kvb-inner-{rate}".replace(" ", "-") for rate in INNER} | {"1": "rate-kvb-3e-3"},
}
SEARCHES = {"Outer rate": (OUTER, _OF_OUTER), "Inner rate": (INNER, _OF_INNER)}
"""Rates, and by method the job of each."""


def gather(found: Results) -> dict[str, Any]:
    results = {}
    for title, (rates, jobs) in SEARCHES.items():
        for method, names in jobs.items():
            losses: dict[str, Any] = {rate: found.loss(names[rate], "books-1") for rate in rates}
            failed = [rate for rate in rates if found.status(names[rate]) == "failed"]
            results[f"{title}, {NAMES[method]}"] = losses | dict.fromkeys(failed, FAILED)
    return results


def tables(results: Data) -> Iterator[Table]:
    for title, (rates, jobs) in SEARCHES.items():
        rows = [[NAMES[method], *_cells(results[f"{title}, {NAMES[method]}"])] for method in jobs]
        yield Table(f"{title}, 200 steps of 64K tokens, books at 1K, seed 0:", ["", *rates], rows)


def _cells(losses: dict[str, Any]) -> list[str]:
    best = min((loss for loss in losses.values() if isinstance(loss, float)), default=None)
    cells = [loss if loss == FAILED else number(loss) for loss in losses.values()]
    return [f"**{cell}**" if loss == best else cell for loss, cell in zip(losses.values(), cells, strict=True)]


def plots(found: Results) -> Iterator[Plot]:
    results = gather(found)
    panels: list[Chart] = []
    for title, (rates, jobs) in SEARCHES.items():
        lines = []
        for name in map(NAMES.__getitem__, jobs):
            losses = results[f"{title}, {name}"]
            points = [(float(rate), losses[rate]) for rate in rates if rate != "no clip"]
            lines.append(Line(name, [(rate, loss) for rate, loss in points if isinstance(loss, float)]))
        ticks = {float(rate): rate for rate in rates if rate != "no clip"}
        unit = "" if panels else "nats per token, books"
        panels.append(panel(title, lines, unit, "", ticks=ticks))
    yield Plot("rates", "Loss after 200 steps by outer and by inner rate", panels)
