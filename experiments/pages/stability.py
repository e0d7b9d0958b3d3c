"""What makes meta-training diverge or stall: one setting changed at a time, 200 steps each."""

from __future__ import annotations

import statistics

from experiments.figures import Line, Panel, plot
from experiments.page import Page, number
from experiments.plan import STABILITY
from experiments.results import Curve, Results

NEEDS = tuple(f"stable-{name}" for name in STABILITY)


def make(found: Results) -> Page:
    page = Page("stability", "What makes meta-training diverge or stall", "Which settings matter, and what failed?")
    rows, lines = [], []
    for name in STABILITY:
        metrics, training = found.metrics[f"stable-{name}"], found.training(f"stable-{name}")
        learning, frozen = (found.loss(f"stable-{name}", "books-1", reading) for reading in (None, "frozen"))
        largest = max(row["grad_norm"] for row in metrics)
        inner, clipped = metrics[-1]["inner_grad_norm"], metrics[-1]["inner_clipped"]
        page.results[name] = {
            "learning": learning,
            "frozen": frozen,
            "largest outer gradient norm": largest,
            "inner gradient norm at the end": inner,
            "share of clipped inner steps at the end": clipped,
            "training loss by tokens": training[::5],
        }
        rows.append([name, number(learning), number(frozen), f"{largest:.2f}", f"{inner:.2f}", f"{clipped:.0%}"])
        lines.append(Line(name, smooth([(x / 1e6, y) for x, y in training if x > 1.5e6])))
    head = ["", "learning", "frozen", "largest outer norm", "inner norm, end", "clipped, end"]
    page.table("200 steps of 64K tokens, books at 1K, seed 0:", head, rows)
    panel = Panel(
        "Training loss", lines, "nats per token", "million tokens", log=False, limits=(4.2, 6.5), ticks=range(2, 14, 2)
    )
    page.plot("training", "Training loss of 200 steps", plot(panel, width=7.5, labels=0.3))
    return page


def smooth(curve: Curve, width: int = 3) -> Curve:
    """A running mean."""
    windows = [curve[max(0, i - width) : i + 1] for i in range(len(curve))]
    return [(window[-1][0], statistics.mean(y for _, y in window)) for window in windows]
