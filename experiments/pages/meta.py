"""Exact, truncated and first-order meta-gradients, at equal tokens, at equal operations and at equal time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, as_stored, number
from experiments.pages import KINDS, job
from experiments.pages.seeds import SEEDS, BySeed, by_seed, mean_line, minus, spread, stored
from experiments.plan import EXTENSION_STEPS, PRETRAINING_STEPS, UNIT
from experiments.results import Results, lag

from longread.config import MetaGradient
from longread.evaluate import Line
from longread.flops import sequence_flops
from longread.recipes import recipe

SLUG = "meta-gradients"
HEADING = """# Exact, truncated and first-order meta-gradients

What does the exact gradient buy, at equal tokens, at equal operations and at equal time?"""
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
LONGER_RUNS = (
    ("swa-longer", "e2e"),
    ("meta-first-order-longer", "e2e"),
    ("meta-first-order-longer", "swa-longer"),
    ("swa-longer", "swa"),
    ("meta-first-order-longer", "meta-first-order"),
)
"""Pairs to subtract; the last two say what the additional tokens gain. The steps were chosen by a count of operations
that was wrong: the longer runs have more of them than exact."""
EQUAL_OPERATIONS = (
    ("swa", "e2e", "e2e"),
    ("meta-first-order", "e2e", "e2e"),
    ("meta-first-order", "swa", "e2e"),
    ("meta-first-order-longer", "swa", "meta-first-order-longer"),
)
"""Pairs to subtract, each at the operations of the third."""
LENGTHS = (1, 8, 32)
READ, FROZEN, OPERATIONS = "learning or static", "frozen", "tokens and operations at 1K"
SPEEDS = json.loads((Path(__file__).resolve().parents[1] / "speeds.json").read_text(encoding="utf-8"))["methods"]
"""Tokens a second at 1K, each on a GPU that it has for itself."""


def gather(found: Results) -> dict[str, Any]:
    costs = {length: operations_of_a_sequence(length) for length in LENGTHS}
    results: dict[str, Any] = {}
    for method, title in TITLES.items():
        for kind in KINDS:
            learning, frozen = (by_seed(found, method, kind, reading) for reading in (None, "frozen"))
            results[f"{title}, {kind}"] = {READ: learning, FROZEN: frozen}
        training = found.training(job(method, 0, 1))
        if training:
            tokens = training[-1][0]
            results[f"{title}, tokens and operations at 1K"] = tokens, costs[1][method] * tokens / UNIT
            share = tokens / (PRETRAINING_STEPS * 64 * UNIT)
            results |= {f"{title}, operations to {L}K": n for L, n in spent(costs, method, share).items()}
    for a, b in (("meta-first-order", "e2e"), *LONGER_RUNS):
        for kind in KINDS:
            difference = minus(by_seed(found, a, kind), by_seed(found, b, kind))
            results[f"{TITLES[a]} − {TITLES[b]}, {kind}"] = difference
    results["training loss minus exact's, by million tokens"] = {line.label: line.points[::4] for line in lags(found)}
    results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in found.repeats.items() if name.startswith("meta-")
    }
    return results


def tables(results: Data) -> Iterator[Table]:
    for kind in KINDS:
        for caption, rows in (
            (
                "at equal operations, interpolated",
                [row_at_equal_operations(results, *row, kind) for row in EQUAL_OPERATIONS],
            ),
            ("the longer runs", [row_of_differences(results, a, b, kind, LENGTHS) for a, b in LONGER_RUNS]),
        ):
            caption = f"{kind.capitalize()}, {caption}, at equal seeds: mean (range; number of seeds):"
            yield Table(caption, ["", *(f"{L}K" for L in LENGTHS)], rows)
    yield Table(
        "First-order − exact at equal tokens and seeds: mean (range; number of seeds):",
        ["", *(f"{L}K" for L in LENGTHS[:2])],
        [[kind, *row_of_differences(results, "meta-first-order", "e2e", kind, LENGTHS[:2])[1:]] for kind in KINDS],
    )
    yield Table(
        "Seed 0, learning / frozen; operations and time of the training at 1K, × SWA's:",
        ["", "tokens at 1K", "operations", "time", *(f"{kind} {L}K" for kind in KINDS for L in LENGTHS)],
        [row_of_method(results, method) for method, title in TITLES.items() if f"{title}, {OPERATIONS}" in results],
    )
    yield Table(
        "Cost of training on a token:",
        [
            "",
            "operations at 1K, × SWA",
            *(f"at {L}K" for L in LENGTHS[1:]),
            "tokens/s at 1K, median (range)",
            "time, × SWA",
        ],
        [row_of_cost(results, method) for method in TITLES if method not in LONGER],
    )


def row_of_differences(results: Data, a: str, b: str, kind: str, lengths: Sequence[int]) -> list[str]:
    name = f"{TITLES[a]} − {TITLES[b]}"
    difference = stored(results[f"{name}, {kind}"])
    return [name, *(spread(difference, L) for L in lengths)]


def row_at_equal_operations(results: Data, a: str, b: str, at: str, kind: str) -> list[str]:
    name = f"{TITLES[a]} − {TITLES[b]}" + ("" if at == "e2e" else ", at its operations")
    difference = minus(*(at_operations_of(results, method, at, kind) for method in (a, b)))
    return [name, *(spread(difference, L) for L in LENGTHS)]


def at_operations_of(results: Data, method: str, other: str, kind: str) -> BySeed:
    """Losses that `method` would have with all the operations of `other`, by seed and length.

    Interpolated by the logarithm of tokens between its run and the longer one. Losses fall ever slower by that, so the
    true one is at most as high.
    """
    losses = stored(results[f"{TITLES[method]}, {kind}"][READ])
    longer = {same: name for name, same in LONGER.items()}.get(method)
    if method == other or longer is None:
        return losses
    more = stored(results[f"{TITLES[longer]}, {kind}"][READ])
    most = math.log(results[f"{TITLES[longer]}, {OPERATIONS}"][0] / results[f"{TITLES[method]}, {OPERATIONS}"][0])

    def way(L: int) -> float:
        wanted, spent = (results[f"{TITLES[name]}, operations to {L}K"] for name in (other, method))
        return math.log(wanted / spent) / most

    return {
        seed: {L: loss + (more[seed][L] - loss) * way(L) for L, loss in row.items() if L in LENGTHS and L in more[seed]}
        for seed, row in losses.items()
        if seed in more
    }


def row_of_method(results: Data, method: str) -> list[str]:
    """Losses of seed 0, and what the training at 1K took."""
    title, cells = TITLES[method], []
    for kind in KINDS:
        learning, frozen = (stored(results[f"{title}, {kind}"][key]).get(0, {}) for key in (READ, FROZEN))
        cells += [" / ".join(filter(None, (number(learning.get(L)), number(frozen.get(L))))) for L in LENGTHS]
    (tokens, operations), (base, of_swa) = (results[f"{name}, {OPERATIONS}"] for name in (title, TITLES["swa"]))
    speed = speed_of(method)
    time = f"{tokens / base * SPEEDS['swa']['median'] / speed['median']:.2f}" if speed else ""
    return [title, f"{tokens / 1e6:.0f}M", f"{operations / of_swa:.2f}", time, *cells]


def row_of_cost(results: Data, method: str) -> list[str]:
    """Of training on one token; what is spent beyond that at 1K is the extension's."""

    def spent(name: str) -> list[float]:
        base, *longer = (results[f"{name}, operations to {L}K"] for L in LENGTHS)
        return [base, *(total - base for total in longer)]

    ratios = [a / b for a, b in zip(spent(TITLES[method]), spent(TITLES["swa"]), strict=True)]
    speed, swa = speed_of(method), SPEEDS["swa"]["median"]
    times = ["", ""]
    if speed:
        times = [f"{speed['median']:,} ({speed['lowest']:,}–{speed['highest']:,})", f"{swa / speed['median']:.2f}"]
    return [TITLES[method], *(f"{ratio:.2f}" for ratio in ratios), *times]


def plots(found: Results) -> Iterator[Plot]:
    yield by_operations(as_stored(gather(found)))
    chart = panel("Training loss minus exact's, same batches", lags(found), "nats per token", "million tokens",
                  log=False, zero="exact", limits=(-0.02, 0.2), ticks=[20, 40, 60])  # fmt: skip
    yield Plot("training", "Training loss minus that of exact meta-gradients", [chart])


def by_operations(results: Data) -> Plot:
    panels = []
    for L in LENGTHS:
        lines = []
        for title in TITLES.values():
            books = stored(results[f"{title}, books"][READ]).get(0, {}).get(L)
            total = results.get(f"{title}, operations to {L}K")
            lines += [Line(title, [(total / 1e15, books)])] if books and total else []
        unit = "" if panels else "nats per token"
        panels.append(panel(f"Books at {L}K, seed 0", lines, unit, "10¹⁵ operations in all", log=False))
    return Plot("operations", "Loss on books by operations of training", panels)


def operations_of_a_sequence(length: int) -> dict[str, float]:
    """Of one outer step at `length` units, by method."""
    configs = {
        method: recipe("small", method) if length == 1 else recipe("small-extend", method, context_length=length * UNIT)
        for method in ("e2e", "naive", "swa")
    }

    def count(method: str, meta_gradient: MetaGradient = "exact", truncate_after: int | None = None) -> float:
        model, loss = configs[method].model, configs[method].loss
        return sequence_flops(
            model, length * UNIT, loss, meta_gradient=meta_gradient, truncate_after=truncate_after
        ).model

    counts = {method: count(method) for method in configs}
    counts["meta-first-order"] = count("e2e", "first-order")
    counts |= {f"meta-cut-{steps}": count("e2e", truncate_after=steps) for steps in (2, 4)}
    return counts | {method: counts[same] for method, same in LONGER.items()}


def speed_of(method: str) -> dict[str, int] | None:
    speed: dict[str, int] | None = SPEEDS.get(LONGER.get(method, method))
    return speed


def spent(costs: dict[int, dict[str, float]], method: str, share: float) -> dict[int, float]:
    """Operations of the training to each length; beyond 1K it is an extension of that at 1K."""
    base = share * PRETRAINING_STEPS * 64 * costs[1][method]
    steps = round(share * EXTENSION_STEPS)
    return {L: base + (steps * 128 / L * costs[L][method] if L > 1 else 0) for L in LENGTHS}


def lags(found: Results) -> list[Line]:
    """Of each method, over all seeds that have both, on equal batches and with equal rates."""
    lines = []
    for method, title in TITLES.items():
        curves = []
        for seed in SEEDS:
            curve, exact = (found.training(job(m, seed, 1)) for m in (method, "e2e"))
            if curve and exact and method != "e2e" and curve[-1][0] == exact[-1][0]:
                curves.append(lag(curve, exact))
        line = mean_line(title, curves)
        lines += [line] if line.points else []
    return lines
