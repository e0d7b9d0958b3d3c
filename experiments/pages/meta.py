"""Exact, truncated and first-order meta-gradients, at equal tokens and at equal operations."""

from __future__ import annotations

from experiments.figures import Line, Panel, plot
from experiments.flops import operations
from experiments.page import Page, number
from experiments.pages import KINDS, job
from experiments.pages.seeds import SEEDS, by_seed, mean_line, minus, spread
from experiments.results import Results, lag

from longread.recipes import recipe

NEEDS = ("e2e-s0", "swa-s0", "meta-first-order-s0")
TITLES = {
    "e2e": "exact",
    "meta-first-order": "first-order",
    "meta-first-order-longer": "first-order, 35 % longer",
    "meta-cut-4": "cut every 4 steps",
    "meta-cut-2": "cut every 2 steps",
    "naive": "static loss (TTT-naive)",
    "swa": "SWA",
}
LENGTHS = (1, 8)


def make(found: Results) -> Page:
    page = Page(
        "meta-gradients",
        "Exact, truncated and first-order meta-gradients",
        "What does the exact gradient buy, at equal tokens and at equal operations?",
    )
    costs = operations_of_a_sequence()
    rows, by_cost = [], []
    for method, title in TITLES.items():
        cells = []
        for kind in KINDS:
            learning, frozen = (by_seed(found, method, kind, reading) for reading in (None, "frozen"))
            page.results[f"{title}, {kind}"] = {"learning or static": learning, "frozen": frozen}
            for length in LENGTHS:
                values = [number(losses.get(0, {}).get(length)) for losses in (learning, frozen)]
                cells.append(" / ".join(filter(None, values)))
        training = found.training(job(method, 0, 1))
        if any(cells) and training:
            tokens = training[-1][0]
            page.results[f"{title}, tokens and operations at 1K"] = tokens, costs[method] * tokens / 1024
            rows.append([title, f"{tokens / 1e6:.0f}M", f"{costs[method] / costs['swa']:.2f}", *cells])
            books = found.loss(job(method, 0, 1), "books-1")
            by_cost += [Line(title, [(costs[method] * tokens / 1024 / 1e15, books)])] if books else []
    columns = (f"{kind} {length}K" for kind in KINDS for length in LENGTHS)
    page.table("Seed 0, learning / frozen:", ["", "tokens at 1K", "operations a token, × SWA", *columns], rows)
    differences = {kind: minus(by_seed(found, "meta-first-order", kind), by_seed(found, "e2e", kind)) for kind in KINDS}
    page.results["first-order minus exact"] = differences
    page.table(
        "First-order − exact at equal tokens and seeds: mean (range; number of seeds):",
        ["", *(f"{length}K" for length in LENGTHS)],
        [[kind, *(spread(rows, length) for length in LENGTHS)] for kind, rows in differences.items()],
    )
    lines = [line for method in TITLES if (line := lags(found, method)).points]
    page.results["training loss minus exact's, by million tokens"] = {line.name: line.points[::4] for line in lines}
    page.results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in found.repeats.items() if name.startswith("meta-")
    }
    panels = [
        Panel("Training loss minus exact's, same batches", lines, "nats per token", "million tokens", log=False,
              zero="exact", limits=(-0.02, 0.2), ticks=[20, 40, 60]),
        Panel("Loss on books at 1K by operations, seed 0", by_cost, "nats per token",
              "10¹⁵ operations of training", log=False),
    ]  # fmt: skip
    page.plot("training", "Training loss minus that of exact meta-gradients", plot(*panels, width=10, labels=0.5))
    return page


def operations_of_a_sequence() -> dict[str, int]:
    """Of one outer step at 1K, by method."""
    exact = recipe("small", "e2e")
    first_order = operations(exact, first_order=True)
    counts = {"e2e": operations(exact), "meta-first-order": first_order, "meta-first-order-longer": first_order}
    counts |= {f"meta-cut-{steps}": operations(exact, truncate_after=steps) for steps in (2, 4)}
    return counts | {method: operations(recipe("small", method)) for method in ("naive", "swa")}


def lags(found: Results, method: str) -> Line:
    """Of all seeds that have both, on equal batches and with equal rates."""
    curves = []
    for seed in SEEDS:
        curve, exact = (found.training(job(m, seed, 1)) for m in (method, "e2e"))
        if curve and exact and method != "e2e" and curve[-1][0] == exact[-1][0]:
            curves.append(lag(curve, exact))
    return mean_line(TITLES[method], curves)
