"""From key-value binding to the end-to-end loss, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.pages import KINDS
from experiments.pages.seeds import by_seed, minus, spread, stored
from experiments.results import Results, lag

from longread.evaluate import Line

SLUG = "kvb-to-e2e"
HEADING = """# From key-value binding to the end-to-end loss

Which step of the derivation helps?"""
NEEDS = ("kvb-s0", "swa-s0")
JOBS = {
    "swa-s0": "SWA",
    "kvb-s0": "TTT-KVB",
    "kvb-simplified": "simplified (Eq. 9)",
    "e2e-every-block": "next-token loss, every block",
    "e2e-s0": "TTT-E2E",
}
LENGTHS = (1, 8, 32)


def gather(found: Results) -> dict[str, Any]:
    losses = {title: {f"{kind} 1K": found.loss(name, f"{kind}-1") for kind in KINDS} for name, title in JOBS.items()}
    differences = {kind: minus(by_seed(found, "kvb", kind), by_seed(found, "swa", kind)) for kind in KINDS}
    return {title: row for title, row in losses.items() if any(row.values())} | {
        "TTT-KVB minus SWA": differences,
        "training loss minus SWA's, by million tokens": {line.label: line.points[::4] for line in lags(found)},
    }


def tables(results: Data) -> Iterator[Table]:
    rows = [[title, *map(number, results[title].values())] for title in JOBS.values() if title in results]
    yield Table("Seed 0, at 1K:", ["", *KINDS], rows)
    differences = {kind: stored(rows) for kind, rows in results["TTT-KVB minus SWA"].items()}
    yield Table(
        "TTT-KVB − SWA at equal seeds: mean (range; number of seeds):",
        ["", *(f"{L}K" for L in LENGTHS)],
        [[kind, *(spread(rows, L) for L in LENGTHS)] for kind, rows in differences.items()],
    )


def plots(found: Results) -> Iterator[Plot]:
    chart = panel(
        "Training loss minus SWA's, same batches", lags(found), "nats per token", "million tokens", log=False,
        zero="SWA", ticks=[20, 40, 60],
    )  # fmt: skip
    yield Plot("training", "Training loss minus that of SWA", [chart])


def lags(found: Results) -> list[Line]:
    swa = found.training("swa-s0")
    return [Line(title, lag(found.training(name), swa)) for name, title in JOBS.items() if name != "swa-s0"]
