"""Exact, first-order and no learning at exactly equal operations, at 7M and at 35M parameters."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.equal import EXACT, LENGTHS, RUNS, EqualRun, network
from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.pages import KINDS, TITLES, job, meta, unit_of
from experiments.pages.meta import FROZEN, READ
from experiments.pages.seeds import BySeed, by_seed, minus, spread, stored
from experiments.plan import EXTENSION_STEPS, PRETRAINING_STEPS, UNIT
from experiments.results import Results

from longread.evaluate import Line

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
AGAIN = "trained again"


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
        results[f"{AGAIN}, {kind}"] = trained_again(found, stored(before[f"exact, {kind}"][READ]), kind)
    for run in (EXACT, *RUNS):
        results[f"{NAMES[run.name]}, training"] = {
            "parameters": network(run.method, run.large).num_parameters,
            "tokens": {L: tokens for L, tokens, _ in training(run)},
            "operations": {L: operations for L, _, operations in training(run)},
        }
    return results


def merge(before: Data, new: Data, _: Data) -> dict[str, Any]:
    """Seeds of `new` join those that the page has or take their place; by how much they moved, "Trained again" says."""
    if not before:
        return dict(new)
    results = dict(before)
    for kind in KINDS:
        again = {name: dict(row) for name, row in before[f"{AGAIN}, {kind}"].items()}
        for name, row in new[f"{AGAIN}, {kind}"].items():
            again.setdefault(name, {}).update(row)
        for run in RUNS:
            label = f"{NAMES[run.name]}, {kind}"
            old, found = (each[label][READ] for each in (before, new))
            for seed in found:
                for L, loss in found[seed].items():
                    if L in old.get(seed, {}) and loss != old[seed][L]:
                        again.setdefault(f"{NAMES[run.name]}, seed {seed}", {})[L] = loss - old[seed][L]
            results[label] = {
                reading: _joined(before[label][reading], new[label][reading]) for reading in (READ, FROZEN)
            }
        results[f"{AGAIN}, {kind}"] = again
    return results


def _joined(before: Data, new: Data) -> dict[str, Any]:
    """Losses by seed and context length, the later where both have one."""
    return {seed: before.get(seed, {}) | new.get(seed, {}) for seed in sorted({*before, *new})}


def tables(results: Data) -> Iterator[Table]:
    for kind in KINDS:
        rows = []
        for pair in PAIRS:
            rows.append([named(pair), *cells(difference(results, pair, kind))])
            before = stored(results[f"{named(pair)}, interpolated, {kind}"])
            rows.append([f"{named(pair)}, as interpolated before", *cells(before)])
        rows += [[named(pair), *cells(difference(results, pair, kind))] for pair in LARGE_PAIRS]
        caption = f"{kind.capitalize()}, at equal operations and seeds: mean (range; number of seeds):"
        yield Table(caption, HEAD, measured(rows))
        rows = [[named(pair), *cells(difference(results, pair, kind))] for pair in EQUAL_TOKENS]
        yield Table(f"{kind.capitalize()}, 35M at equal tokens: difference (number of seeds):", HEAD, measured(rows))
    yield Table(
        "Every run, learning / frozen:",
        ["", *(f"{kind} {L}K" for kind in KINDS for L in COLUMNS)],
        [row for name in NAMES for row in rows_of_losses(results, name)],
    )
    spent = (*(f"tokens, {L}K" for L in COLUMNS), *(f"10¹⁵ operations, {L}K" for L in COLUMNS))
    yield Table(
        "Training, tokens and operations up to the end of each:",
        ["", "parameters", *spent, "× exact"],
        [row_of_training(results, name) for name in NAMES if rows_of_losses(results, name)],
    )
    yield Table(
        "Trained again, the loss minus that of the first time:",
        ["", *(f"{kind} {L}K" for kind in KINDS for L in COLUMNS)],
        rows_again(results),
    )


def summary(results: Data) -> Table:
    """On books: for who only looks at one table."""
    rows = []
    for size, pairs in (("7M", PAIRS), ("35M", LARGE_PAIRS)):
        for name, pair in zip(("SWA", "first-order TTT-E2E"), pairs, strict=False):
            rows.append([f"{name}, {size}", *cells(difference(results, pair, "books"))])
    caption = "Loss on books minus that of exact TTT-E2E at its operations: mean (range; number of seeds):"
    return Table(caption, HEAD, measured(rows))


def plots(results: Data) -> Iterator[Plot]:
    charts = []
    for kind in KINDS:
        lines = []
        for a, b in (*PAIRS[:2], *LARGE_PAIRS[:2]):
            lines.append(mean_by_length(NAMES[a], difference(results, (a, b), kind)))
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


def trained_again(found: Results, exact: BySeed, kind: str) -> dict[str, dict[int, float]]:
    """Run -> context length -> by how much the loss of the last training is above that of the first.

    Of `exact` the first training, which another page has, is what counts here; of all others the last one.
    """
    rows: dict[str, dict[int, float]] = {}
    for run in (EXACT, *RUNS):
        for seed, L in itertools.product(run.seeds, COLUMNS):
            losses = list(found.runs.get((job(run.name, seed, L), f"{kind}-{L}"), {}).values())
            if run is EXACT and L in exact.get(seed, {}):
                losses.insert(0, exact[seed][L])
            if len(losses) > 1:
                rows.setdefault(f"{NAMES[run.name]}, seed {seed}", {})[L] = losses[-1] - losses[0]
    return rows


def mean_by_length(name: str, rows: BySeed) -> Line:
    """Over the seeds that there are at each length, with their range: differences of equal seeds."""
    columns = [(L, [row[L] for row in rows.values() if L in row]) for L in COLUMNS]
    columns = [(L, values) for L, values in columns if values]
    ranges = [(min(values), max(values)) for _, values in columns]
    several = any(len(values) > 1 for _, values in columns)
    return Line(name, [(L * UNIT, statistics.mean(values)) for L, values in columns], ranges if several else None)


def figures_of(slug: str) -> Any:
    """The kept figures of another page."""
    (folder,) = Path(__file__).resolve().parents[1].glob(f"*_{slug}")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def measured(rows: Sequence[list[str]]) -> list[list[str]]:
    """Those of which something was."""
    return [row for row in rows if any(row[1:])]


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
    by_kind = {kind: results[f"{AGAIN}, {kind}"] for kind in KINDS}
    names = dict.fromkeys(name for rows in by_kind.values() for name in rows)
    return [
        [name] + [signed(by_kind[kind].get(name, {}).get(str(L))) for kind in KINDS for L in COLUMNS] for name in names
    ]


def signed(difference: float | None) -> str:
    return "" if difference is None else f"{difference:+.3f}".replace("-", "−")
