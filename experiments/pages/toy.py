"""The toy of Figure 2: two blocks that hardly attend, and what an inner step after each mini-batch does."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.results import Curve, Results

from longread.evaluate import Line

SLUG = "figure-2-toy"
HEADING = """# The toy of Figure 2

Is the order that of the paper, with drops after each mini-batch?"""
NEEDS = ("toy-none", "toy-full", "toy-e2e-16", "toy-naive")
TITLES = {
    "full": "full attention",
    "none": "SWA, window of one token",
    "naive": "TTT-naive, b = 1",
    "e2e-16": "TTT-E2E, b = 16",
    "e2e-1": "TTT-E2E, b = 1",
}
FIRST = 23
"""Token from which on the mean of the table is taken: an index where a bin begins."""


def gather(found: Results) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, title in TITLES.items():
        for reading in ("static", "learning", "frozen"):
            result = found.reading(f"toy-{name}", "books-index", reading)
            if result:
                at = {row["start"] + 1: row["score"]["nats_per_token"]["mean"] for row in result["at_index"]}
                curve = {f"{r['start']}–{r['end']}": r["score"]["nats_per_token"]["mean"] for r in result["curve"]}
                results[title + (", frozen" if reading == "frozen" else "")] = {"at": at, "curve": curve}
    losses = {title: trained(found.training(f"toy-{name}")) for name, title in TITLES.items()}
    return results | {"training loss": losses}


def tables(results: Data) -> Iterator[Table]:
    readings = {name: row for name, row in results.items() if name != "training loss"}
    head = [f"token {index}" for index in next(iter(readings.values()))["at"]]
    yield Table(
        "Loss at a token, and the mean over tokens 23 to 128:",
        ["", *head, "23–128"],
        [
            [name, *map(number, row["at"].values()), number(mean_from(row["curve"], FIRST))]
            for name, row in readings.items()
        ],
    )
    yield Table(
        "Training loss, mean over 50 steps of equal batches:",
        ["", "in the middle", "at the end"],
        [[title, *map(number, pair)] for title, pair in results["training loss"].items()],
    )


def plots(found: Results) -> Iterator[Plot]:
    none = dict(found.curve("toy-none", "books-index"))
    lines = [
        Line(title, [(x, y - none[x]) for x, y in found.curve(f"toy-{name}", "books-index") if x > 3])
        for name, title in TITLES.items()
        if name != "none"
    ]
    chart = panel(
        "Loss minus that of the model without attention", lines, "nats per token", "token index", zero="no attention",
        ticks=[4, 8, 16, 32, 64, 128],
    )  # fmt: skip
    yield Plot("toy", "Loss minus that without attention, by token index", [chart])


def trained(curve: Curve) -> tuple[float, float]:
    """Means of the training loss around the middle and at the end, over an eighth of the steps."""
    eighth = len(curve) // 8
    starts = (len(curve) - eighth) // 2, len(curve) - eighth
    middle, end = (statistics.mean(loss for _, loss in curve[i : i + eighth]) for i in starts)
    return middle, end


def mean_from(curve: Mapping[str, float], first: int) -> float:
    """Of the bins `start–end` from token `first` on, by their tokens."""
    bins = {tuple(map(int, name.split("–"))): loss for name, loss in curve.items()}
    kept = {(start, end): loss for (start, end), loss in bins.items() if start >= first}
    return sum((end - start) * loss for (start, end), loss in kept.items()) / sum(end - start for start, end in kept)
