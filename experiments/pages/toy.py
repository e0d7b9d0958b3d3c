"""The toy of Figure 2: two blocks that hardly attend, and what an inner step after each mini-batch does."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.figures import Line, Panel, plot
from experiments.page import Page, number
from experiments.results import Curve, Results

NEEDS = ("toy-none", "toy-full", "toy-e2e-16", "toy-naive")
TITLES = {
    "full": "full attention",
    "none": "SWA, window of one token",
    "naive": "TTT-naive, b = 1",
    "e2e-16": "TTT-E2E, b = 16",
    "e2e-1": "TTT-E2E, b = 1",
}


def make(found: Results) -> Page:
    page = Page(
        "figure-2-toy", "The toy of Figure 2", "Is the order that of the paper, with drops after each mini-batch?"
    )
    rows, head = [], []
    for name, title in TITLES.items():
        for reading in ("static", "learning", "frozen"):
            result = found.reading(f"toy-{name}", "books-index", reading)
            if result:
                head = [f"token {row['start'] + 1}" for row in result["at_index"]]
                this = title + (", frozen" if reading == "frozen" else "")
                at = {row["start"] + 1: row["score"]["nats_per_token"]["mean"] for row in result["at_index"]}
                curve = {f"{r['start']}–{r['end']}": r["score"]["nats_per_token"]["mean"] for r in result["curve"]}
                page.results[this] = {"at": at, "curve": curve}
                rows.append([this, *(number(loss) for loss in at.values()), number(curve_mean(result["curve"][8:]))])
    page.table("Loss at a token, and the mean over tokens 23 to 128:", ["", *head, "23–128"], rows)
    losses = {title: trained(found.training(f"toy-{name}")) for name, title in TITLES.items()}
    page.results["training loss"] = losses
    page.table(
        "Training loss, mean over 50 steps of equal batches:",
        ["", "in the middle", "at the end"],
        [[title, *map(number, pair)] for title, pair in losses.items()],
    )
    none = dict(found.curve("toy-none", "books-index"))
    lines = [
        Line(title, [(x, y - none[x]) for x, y in found.curve(f"toy-{name}", "books-index") if x > 3])
        for name, title in TITLES.items()
        if name != "none"
    ]
    panel = Panel(
        "Loss minus that of the model without attention", lines, "nats per token", "token index", zero="no attention",
        ticks=[4, 8, 16, 32, 64, 128],
    )  # fmt: skip
    page.plot("toy", "Loss minus that without attention, by token index", plot(panel, width=7.5, labels=0.3))
    return page


def trained(curve: Curve) -> tuple[float, float]:
    """Means of the training loss around the middle and at the end, over an eighth of the steps."""
    eighth = len(curve) // 8
    starts = (len(curve) - eighth) // 2, len(curve) - eighth
    middle, end = (statistics.mean(loss for _, loss in curve[i : i + eighth]) for i in starts)
    return middle, end


def curve_mean(rows: Sequence[dict[str, Any]]) -> float:
    total = sum(r["end"] - r["start"] for r in rows)
    return float(sum((r["end"] - r["start"]) * r["score"]["nats_per_token"]["mean"] for r in rows) / total)
