"""Exact, truncated and first-order meta-gradients, at equal tokens, at equal operations and at equal time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from experiments.figures import Line, Panel, plot
from experiments.flops import operations
from experiments.page import Page, number
from experiments.pages import KINDS, job
from experiments.pages.seeds import SEEDS, by_seed, mean_line, minus, spread
from experiments.plan import EXTENSION_STEPS, PRETRAINING_STEPS, UNIT
from experiments.results import Results, lag

from longread.recipes import recipe

NEEDS = ("e2e-s0", "swa-s0", "meta-first-order-s0")
TITLES = {
    "e2e": "exact",
    "meta-first-order": "first-order",
    "meta-first-order-longer": "first-order, 35 % longer",
    "meta-cut-4": "cut every 4 steps",
    "meta-cut-2": "cut every 2 steps",
    "meta-cut-2-longer": "cut every 2 steps, 8 % longer",
    "naive": "static loss (TTT-naive)",
    "swa": "SWA",
    "swa-longer": "SWA, 54 % longer",
}
LONGER = {"meta-first-order-longer": "meta-first-order", "meta-cut-2-longer": "meta-cut-2", "swa-longer": "swa"}
"""The same training with more steps: a token costs as much."""
EQUAL_OPERATIONS = (
    ("swa-longer", "e2e"),
    ("meta-first-order-longer", "e2e"),
    ("meta-first-order-longer", "swa-longer"),
    ("swa-longer", "swa"),
    ("meta-first-order-longer", "meta-first-order"),
)
"""Pairs to subtract; the last two say what the additional tokens gain."""
LENGTHS = (1, 8, 32)
SPEEDS = json.loads((Path(__file__).resolve().parents[1] / "speeds.json").read_text(encoding="utf-8"))["methods"]
"""Tokens a second at 1K, each on a GPU that it has for itself."""


def make(found: Results) -> Page:
    page = Page(
        "meta-gradients",
        "Exact, truncated and first-order meta-gradients",
        "What does the exact gradient buy, at equal tokens, at equal operations and at equal time?",
    )
    costs = {length: operations_of_a_sequence(length) for length in LENGTHS}
    rows = []
    by_cost: dict[int, list[Line]] = {length: [] for length in LENGTHS}
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
            page.results[f"{title}, tokens and operations at 1K"] = tokens, costs[1][method] * tokens / UNIT
            share = tokens / (PRETRAINING_STEPS * 64 * UNIT)
            cost = [share * costs[1][method] / costs[1]["swa"]]
            cost += [share * SPEEDS["swa"]["median"] / speed["median"]] if (speed := speed_of(method)) else []
            cost_cells = [f"{ratio:.2f}" for ratio in cost] + [""] * (2 - len(cost))
            rows.append([title, f"{tokens / 1e6:.0f}M", *cost_cells, *cells])
            for length, total in spent(costs, method, share).items():
                page.results[f"{title}, operations to {length}K"] = total
                books = found.loss(job(method, 0, length), f"books-{length}")
                by_cost[length] += [Line(title, [(total / 1e15, books)])] if books else []
    columns = (f"{kind} {length}K" for kind in KINDS for length in LENGTHS)
    head = ["", "tokens at 1K", "operations", "time", *columns]
    page.table("Seed 0, learning / frozen; operations and time of the training at 1K, × SWA's:", head, rows)
    page.table(
        "Cost of training on a token:",
        [
            "",
            "operations at 1K, × SWA",
            *(f"at {length}K" for length in LENGTHS[1:]),
            "tokens/s at 1K, median (range)",
            "time, × SWA",
        ],
        cost_rows(costs),
    )
    tables_of_differences(found, page)
    lines = [line for method in TITLES if (line := lags(found, method)).points]
    page.results["training loss minus exact's, by million tokens"] = {line.name: line.points[::4] for line in lines}
    page.results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in found.repeats.items() if name.startswith("meta-")
    }
    panel = Panel("Training loss minus exact's, same batches", lines, "nats per token", "million tokens", log=False,
                  zero="exact", limits=(-0.02, 0.2), ticks=[20, 40, 60])  # fmt: skip
    page.plot("training", "Training loss minus that of exact meta-gradients", plot(panel, width=6.5, labels=0.42))
    panels = (
        Panel(f"Books at {length}K, seed 0", lines, "" if i else "nats per token", "10¹⁵ operations in all", log=False)
        for i, (length, lines) in enumerate(by_cost.items())
    )
    page.plot("operations", "Loss on books by operations of training", plot(*panels, width=15, labels=0.5))
    return page


def tables_of_differences(found: Results, page: Page) -> None:
    """At equal seeds: first-order against exact at equal tokens, and what else the operations of exact can buy."""
    tokens = {kind: minus(by_seed(found, "meta-first-order", kind), by_seed(found, "e2e", kind)) for kind in KINDS}
    page.results["first-order minus exact"] = tokens
    page.table(
        "First-order − exact at equal tokens and seeds: mean (range; number of seeds):",
        ["", *(f"{length}K" for length in LENGTHS[:2])],
        [[kind, *(spread(rows, length) for length in LENGTHS[:2])] for kind, rows in tokens.items()],
    )
    for kind in KINDS:
        rows = []
        for a, b in EQUAL_OPERATIONS:
            name = f"{TITLES[a]} − {TITLES[b]}"
            difference = minus(by_seed(found, a, kind), by_seed(found, b, kind))
            page.results[f"{name}, {kind}"] = difference
            rows.append([name, *(spread(difference, length) for length in LENGTHS)])
        head = ["", *(f"{length}K" for length in LENGTHS)]
        caption = f"{kind.capitalize()}, what the operations of exact buy, at equal seeds"
        page.table(f"{caption}: mean (range; number of seeds):", head, rows)


def operations_of_a_sequence(length: int) -> dict[str, int]:
    """Of one outer step at `length` units, by method."""
    configs = {
        method: recipe("small", method) if length == 1 else recipe("small-extend", method, context_length=length * UNIT)
        for method in ("e2e", "naive", "swa")
    }
    counts = {method: operations(config) for method, config in configs.items()}
    counts["meta-first-order"] = operations(configs["e2e"], first_order=True)
    counts |= {f"meta-cut-{steps}": operations(configs["e2e"], truncate_after=steps) for steps in (2, 4)}
    return counts | {method: counts[same] for method, same in LONGER.items()}


def speed_of(method: str) -> dict[str, int] | None:
    speed: dict[str, int] | None = SPEEDS.get(LONGER.get(method, method))
    return speed


def spent(costs: dict[int, dict[str, int]], method: str, share: float) -> dict[int, float]:
    """Operations of the training to each length; beyond 1K it is an extension of that at 1K."""
    base = share * PRETRAINING_STEPS * 64 * costs[1][method]
    steps = round(share * EXTENSION_STEPS)
    return {L: base + (steps * 128 / L * costs[L][method] if L > 1 else 0) for L in LENGTHS}


def cost_rows(costs: dict[int, dict[str, int]]) -> Iterator[list[str]]:
    for method, title in TITLES.items():
        if method not in LONGER:
            row = [title, *(f"{costs[length][method] / costs[length]['swa']:.2f}" for length in LENGTHS)]
            if speed := speed_of(method):
                row += [f"{speed['median']:,} ({speed['lowest']:,}–{speed['highest']:,})"]
                row += [f"{SPEEDS['swa']['median'] / speed['median']:.2f}"]
            yield row + [""] * (len(LENGTHS) + 3 - len(row))


def lags(found: Results, method: str) -> Line:
    """Of all seeds that have both, on equal batches and with equal rates."""
    curves = []
    for seed in SEEDS:
        curve, exact = (found.training(job(m, seed, 1)) for m in (method, "e2e"))
        if curve and exact and method != "e2e" and curve[-1][0] == exact[-1][0]:
            curves.append(lag(curve, exact))
    return mean_line(TITLES[method], curves)
