"""Exact, first-order and no learning at exactly equal operations, at 7M and at 35M parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.equal import EXACT, LENGTHS, RUNS, EqualRun, network
from experiments.figures import panel
from experiments.page import Data, Plot, Table, as_stored, number
from experiments.pages import KINDS, TITLES, meta, unit_of
from experiments.pages.meta import FROZEN, READ
from experiments.pages.seeds import BySeed, by_seed, line, minus, spread, stored
from experiments.plan import EXTENSION_STEPS, PRETRAINING_STEPS, UNIT
from experiments.results import Results

SLUG = "equal-operations"
HEADING = """# Exactly equal operations, at two sizes

With as many operations as exact TTT-E2E spends, how far ahead or behind are SWA and first-order TTT-E2E, at 7M and at
35M parameters?"""
NEEDS = ("swa-equal-s0", "first-order-equal-s0", "large-e2e-s0", "large-swa-equal-s0")
COLUMNS = (1, *LENGTHS)
HEAD = ["", *(f"{L}K" for L in COLUMNS)]
NAMES = {
    "e2e": "exact",
    "swa-equal": "SWA",
    "first-order-equal": "first-order",
    "large-e2e": "exact, 35M",
    "large-swa": "SWA, 35M, equal tokens",
    "large-swa-equal": "SWA, 35M",
    "large-first-order-equal": "first-order, 35M",
    "large-full": "full attention, 35M, equal tokens",
}
PAIRS = (("swa-equal", "e2e"), ("first-order-equal", "e2e"), ("first-order-equal", "swa-equal"))
LARGE_PAIRS = tuple((f"large-{a}", f"large-{b}") for a, b in PAIRS)
EQUAL_TOKENS = (("large-swa", "large-e2e"), ("large-full", "large-e2e"), ("large-full", "large-swa"))
INTERPOLATED = {
    ("swa-equal", "e2e"): ("swa", "e2e"),
    ("first-order-equal", "e2e"): ("meta-first-order", "e2e"),
    ("first-order-equal", "swa-equal"): ("meta-first-order", "swa"),
}
"""The same pairs as the page of meta-gradients names them."""
AGAIN = "exact, seed 1, trained again"


def gather(found: Results) -> dict[str, Any]:
    before = figures_of(meta.SLUG)
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[f"exact, {kind}"] = before[f"exact, {kind}"]
        for run in RUNS:
            readings = {READ: None, FROZEN: "frozen"}
            results[f"{NAMES[run.name]}, {kind}"] = {
                key: by_seed(found, run.name, kind, reading) for key, reading in readings.items()
            }
        for pair, names in INTERPOLATED.items():
            losses = (meta.at_operations_of(before, name, "e2e", kind) for name in names)
            results[f"{named(pair)}, interpolated, {kind}"] = minus(*losses)
        again = {str(L): found.loss("e2e-s1" + (f"-{L}" if L > 1 else ""), f"{kind}-{L}") for L in COLUMNS}
        results[f"{AGAIN}, {kind}"] = {L: loss for L, loss in again.items() if loss is not None}
    for run in (EXACT, *RUNS):
        results[f"{NAMES[run.name]}, training"] = {
            "parameters": network(run.method, run.large).num_parameters,
            "tokens": {L: tokens for L, tokens, _ in training(run)},
            "operations": {L: operations for L, _, operations in training(run)},
        }
    return results


def tables(results: Data) -> Iterator[Table]:
    for kind in KINDS:
        rows = []
        for pair in PAIRS:
            rows.append([named(pair), *cells(difference(results, pair, kind))])
            before = stored(results[f"{named(pair)}, interpolated, {kind}"])
            rows.append([f"{named(pair)}, as interpolated before", *cells(before)])
        rows += [[named(pair), *cells(difference(results, pair, kind))] for pair in LARGE_PAIRS]
        yield Table(f"{kind.capitalize()}, at equal operations and seeds: mean (range; number of seeds):", HEAD, rows)
        yield Table(
            f"{kind.capitalize()}, 35M at equal tokens: difference (number of seeds):",
            HEAD,
            [[named(pair), *cells(difference(results, pair, kind))] for pair in EQUAL_TOKENS],
        )
    yield Table(
        "Every run, learning / frozen:",
        ["", *(f"{kind} {L}K" for kind in KINDS for L in COLUMNS)],
        [row for name in NAMES for row in rows_of_losses(results, name)],
    )
    spent = (*(f"tokens, {L}K" for L in COLUMNS), *(f"10¹⁵ operations, {L}K" for L in COLUMNS))
    yield Table(
        "Training, tokens and operations up to the end of each:",
        ["", "parameters", *spent, "× exact"],
        [row_of_training(results, name) for name in NAMES],
    )
    yield Table(f"{AGAIN[0].upper()}{AGAIN[1:]}, minus the run it is compared with:", HEAD, rows_again(results))


def plots(found: Results) -> Iterator[Plot]:
    results = as_stored(gather(found))
    charts = []
    for kind in KINDS:
        lines = []
        for a, b in (*PAIRS[:2], *LARGE_PAIRS[:2]):
            lines.append(line(NAMES[a], difference(results, (a, b), kind)))
        ticks = [L * UNIT for L in COLUMNS]
        title = f"{TITLES[kind]}: loss minus exact's at equal operations"
        charts.append(panel(title, lines, unit_of(kind), "context length, tokens", zero="exact", ticks=ticks))
    yield Plot("equal", "Loss minus that of exact TTT-E2E at equal operations, by context length and size", charts)


def training(run: EqualRun) -> Iterator[tuple[int, int, float]]:
    """Context length in units, tokens and operations in all of the training up to there, as the plan gives steps."""
    steps = round(PRETRAINING_STEPS * run.share(UNIT))
    base = steps * 64 * UNIT
    spent = base * run.operations(UNIT)
    yield 1, base, spent
    for L in LENGTHS:
        tokens = round(EXTENSION_STEPS * run.share(L * UNIT)) * 128 * UNIT
        yield L, base + tokens, spent + tokens * run.operations(L * UNIT)


def figures_of(slug: str) -> Any:
    """The kept figures of another page."""
    (folder,) = Path(__file__).resolve().parents[1].glob(f"*_{slug}")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def named(pair: Sequence[str]) -> str:
    a, b = (NAMES[name] for name in pair)
    return f"{a} − {b.removesuffix(', 35M') if a.count(', 35M') else b}"


def losses_of(results: Data, name: str, kind: str, reading: str = READ) -> BySeed:
    return stored(results[f"{NAMES[name]}, {kind}"][reading])


def difference(results: Data, pair: Sequence[str], kind: str) -> BySeed:
    return minus(*(losses_of(results, name, kind) for name in pair))


def cells(rows: BySeed) -> list[str]:
    return [spread(rows, L) for L in COLUMNS]


def rows_of_losses(results: Data, name: str) -> list[list[str]]:
    by_kind = {kind: [losses_of(results, name, kind, reading) for reading in (READ, FROZEN)] for kind in KINDS}
    seeds = sorted({seed for learning, _ in by_kind.values() for seed in learning})
    return [
        [f"{NAMES[name]}, seed {seed}"]
        + [
            " / ".join(filter(None, (number(row.get(seed, {}).get(L)) for row in by_kind[kind])))
            for kind in KINDS
            for L in COLUMNS
        ]
        for seed in seeds
    ]


def row_of_training(results: Data, name: str) -> list[str]:
    mine, exact = (results[f"{NAMES[n]}, training"] for n in (name, "large-e2e" if "large" in name else "e2e"))
    ratios = [mine["operations"][str(L)] / exact["operations"][str(L)] for L in COLUMNS]
    return [
        NAMES[name],
        f"{mine['parameters'] / 1e6:.2f}M",
        *(f"{mine['tokens'][str(L)] / 1e6:.1f}M" for L in COLUMNS),
        *(f"{mine['operations'][str(L)] / 1e15:.2f}" for L in COLUMNS),
        ", ".join(f"{ratio:.3f}" for ratio in ratios),
    ]


def rows_again(results: Data) -> list[list[str]]:
    rows = []
    for kind in KINDS:
        again, first = results[f"{AGAIN}, {kind}"], losses_of(results, "e2e", kind).get(1, {})
        differences = {L: again[str(L)] - first[L] for L in COLUMNS if str(L) in again and L in first}
        rows.append([kind, *cells({1: differences})])
    return rows
