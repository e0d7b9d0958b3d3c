"""Outer and inner rates of the baselines, 200 steps each; those of TTT-E2E are of the page on stability."""

from __future__ import annotations

from experiments.figures import Line, Panel, plot
from experiments.page import Page, number
from experiments.pages import NAMES
from experiments.plan import RATES
from experiments.results import Results

NEEDS = ("rate-swa-3e-3", "rate-full-3e-3")
OUTER = ("1e-3", "3e-3", "1e-2")
INNER = ("0.1", "0.3", "1", "3", "no clip")


def make(found: Results) -> Page:
    page = Page("rates", "Which rates suit the baselines?", "Are the recipe's the best for each method?")
    outer = {"e2e": {"1e-3": "stable-lr-1e-3", "3e-3": "stable-base", "1e-2": "stable-lr-1e-2"}}
    outer |= {method: {rate: f"rate-{method}-{rate}" for rate in OUTER} for method in RATES}
    inner = {
        "e2e": {rate: f"stable-inner-lr-{rate}" for rate in INNER},
        "kvb": {rate: f"rate-kvb-inner-{rate}".replace(" ", "-") for rate in INNER},
    }
    inner["e2e"] |= {"1": "stable-base", "no clip": "stable-no-inner-clip"}
    inner["kvb"] |= {"1": "rate-kvb-3e-3"}
    panels: list[Panel] = []
    for title, rates, jobs in (("Outer rate", OUTER, outer), ("Inner rate", INNER, inner)):
        rows, lines = [], []
        for method, names in jobs.items():
            losses = {rate: found.loss(names[rate], "books-1") for rate in rates}
            failed = {rate for rate in rates if found.status(names[rate]) == "failed"}
            page.results[f"{title}, {NAMES[method]}"] = losses | dict.fromkeys(failed, "failed")
            best = min((loss for loss in losses.values() if loss is not None), default=None)
            cells = {
                rate: f"**{number(loss)}**" if loss and loss == best else number(loss) for rate, loss in losses.items()
            }
            rows.append([NAMES[method], *(cells[rate] or ("failed" if rate in failed else "") for rate in rates)])
            points = [(float(rate), loss) for rate, loss in losses.items() if loss is not None and rate != "no clip"]
            lines.append(Line(NAMES[method], points))
        page.table(f"{title}, 200 steps of 64K tokens, books at 1K, seed 0:", ["", *rates], rows)
        ticks = {float(rate): rate for rate in rates if rate != "no clip"}
        unit = "" if panels else "nats per token, books"
        panels.append(Panel(title, lines, unit, "", markers=True, ticks=list(ticks), names=ticks))
    page.plot("rates", "Loss after 200 steps by outer and by inner rate", plot(*panels, labels=0.45))
    return page
