"""From key-value binding to the end-to-end loss, step by step."""

from __future__ import annotations

from experiments.figures import Line, Panel, plot
from experiments.page import Page, number
from experiments.pages import KINDS
from experiments.pages.seeds import by_seed, minus, spread
from experiments.results import Results, lag

NEEDS = ("kvb-s0", "swa-s0")
JOBS = {
    "swa-s0": "SWA",
    "kvb-s0": "TTT-KVB",
    "kvb-simplified": "simplified (Eq. 9)",
    "e2e-every-block": "next-token loss, every block",
    "e2e-s0": "TTT-E2E",
}
LENGTHS = (1, 8, 32)


def make(found: Results) -> Page:
    page = Page("kvb-to-e2e", "From key-value binding to the end-to-end loss", "Which step of the derivation helps?")
    rows = []
    for name, title in JOBS.items():
        losses = {f"{kind} 1K": found.loss(name, f"{kind}-1") for kind in KINDS}
        if any(losses.values()):
            page.results[title] = losses
            rows.append([title, *map(number, losses.values())])
    page.table("Seed 0, at 1K:", ["", *KINDS], rows)
    differences = {kind: minus(by_seed(found, "kvb", kind), by_seed(found, "swa", kind)) for kind in KINDS}
    page.results["TTT-KVB minus SWA"] = differences
    page.table(
        "TTT-KVB − SWA at equal seeds: mean (range; number of seeds):",
        ["", *(f"{L}K" for L in LENGTHS)],
        [[kind, *(spread(rows, L) for L in LENGTHS)] for kind, rows in differences.items()],
    )
    swa = found.training("swa-s0")
    lines = [Line(title, lag(found.training(name), swa)) for name, title in JOBS.items() if name != "swa-s0"]
    page.results["training loss minus SWA's, by million tokens"] = {line.name: line.points[::4] for line in lines}
    panel = Panel(
        "Training loss minus SWA's, same batches", lines, "nats per token", "million tokens", log=False, zero="SWA",
        ticks=[20, 40, 60],
    )  # fmt: skip
    page.plot("training", "Training loss minus that of SWA", plot(panel, width=7.5, labels=0.42))
    return page
