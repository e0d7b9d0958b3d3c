"""What makes meta-training diverge or stall: one setting changed at a time, 200 steps each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.plan import STABILITY
from experiments.results import Curve, Results

from longread.evaluate import Line

SLUG = "stability"
HEADING = """# What makes meta-training diverge or stall

Which settings matter, and what failed?"""
NEEDS = tuple(f"stable-{name}" for name in STABILITY)
LARGEST = "largest outer gradient norm"
INNER, CLIPPED = "inner gradient norm at the end", "share of clipped inner steps at the end"


def gather(found: Results) -> dict[str, Any]:
    results = {}
    for name in STABILITY:
        metrics = found.metrics[f"stable-{name}"]
        results[name] = {
            "learning": found.loss(f"stable-{name}", "books-1"),
            "frozen": found.loss(f"stable-{name}", "books-1", "frozen"),
            LARGEST: max(row["grad_norm"] for row in metrics),
            INNER: metrics[-1]["inner_grad_norm"],
            CLIPPED: metrics[-1]["inner_clipped"],
            "training loss by tokens": found.training(f"stable-{name}")[::5],
        }
    return results


def tables(results: Data) -> Iterator[Table]:
    head = ["", "learning", "frozen", "largest outer norm", "inner norm, end", "clipped, end"]
    rows = [
        [name, *(number(row[key]) for key in ("learning", "frozen")), f"{row[LARGEST]:.2f}", f"{row[INNER]:.2f}",
         f"{row[CLIPPED]:.0%}"]
        for name, row in results.items()
    ]  # fmt: skip
    yield Table("200 steps of 64K tokens, books at 1K, seed 0:", head, rows)


def plots(found: Results) -> Iterator[Plot]:
    curves = {name: found.training(f"stable-{name}") for name in STABILITY}
    lines = [Line(name, smooth([(x / 1e6, y) for x, y in curve if x > 1.5e6])) for name, curve in curves.items()]
    chart = panel(
        "Training loss", lines, "nats per token", "million tokens", log=False, limits=(4.2, 6.5), ticks=range(2, 14, 2)
    )
    yield Plot("training", "Training loss of 200 steps", [chart])


def smooth(curve: Curve, width: int = 3) -> Curve:
    """A running mean."""
    windows = [curve[max(0, i - width) : i + 1] for i in range(len(curve))]
    return [(window[-1][0], statistics.mean(y for _, y in window)) for window in windows]
