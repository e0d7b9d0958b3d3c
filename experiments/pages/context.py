"""Loss by context length, and by token index in the longest: the paper's Figure 1 (left) and Figure 6, in small."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.pages import KINDS, NAMES, TITLES, job, unit_of
from experiments.pages.seeds import (
    LENGTHS,
    SEEDS,
    BySeed,
    by_seed,
    line,
    mean_line,
    minus,
    named,
    spread,
    stored,
    whole,
)
from experiments.plan import METHODS, UNIT
from experiments.results import Results

from longread.evaluate import Chart, Line

SLUG = "context-length"
HEADING = """# Loss by context length and by token index

Does TTT-E2E use a longer context as full attention does, and the others not?"""
NEEDS = ("e2e-s0-32", "swa-s0-32", "full-s0-32")
TICKS = [L * UNIT for L in LENGTHS]
LONGER = {"SWA, 54 % more tokens": "swa-longer", "first-order, 35 % more tokens": "meta-first-order-longer"}
"""14 % and 12 % more operations than TTT-E2E."""
FORGOTTEN = "loss at 1K after minus before the extension"
HEAD = ["", *(f"{L}K" for L in LENGTHS)]
READINGS = {
    "TTT-E2E": ("e2e", None),
    "TTT-E2E, frozen": ("e2e", "frozen"),
    "full attention": ("full", None),
    "SWA": ("swa", None),
}


def gather(found: Results) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[f"loss, {kind}"] = {m: rows for m in METHODS if (rows := by_seed(found, m, kind))}
        results |= {f"loss, {kind}, {name}": by_seed(found, m, kind) for name, m in LONGER.items()}
        for name, (method, reading) in READINGS.items():
            for seed in read_by_index(found, kind):
                bins = found.bins(job(method, seed, 32), f"{kind}-32", reading)
                results[f"by index, {kind}, {name}, seed {seed}"] = bins
    for method in METHODS:
        for kind in KINDS:
            results[f"{FORGOTTEN}, {NAMES[method]}, {kind}"] = forgotten(found, method, kind)
    results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in sorted(found.repeats.items()) if name[:3] != "box"
    }
    return results


def tables(results: Data) -> Iterator[Table]:
    for kind in KINDS:
        yield from by_length(results, kind)
        yield by_index(results, kind)
    rows = []
    for name in map(NAMES.__getitem__, METHODS):
        cells = [spread(stored(results[f"{FORGOTTEN}, {name}, {kind}"]), 1) for kind in KINDS]
        if any(cells):
            rows.append([name, *cells])
    yield Table(
        "Extended to 32K and read at 1K, minus before the extension: mean (range; number of seeds):", ["", *KINDS], rows
    )


def by_length(results: Data, kind: str) -> Iterator[Table]:
    losses = {method: stored(rows) for method, rows in results[f"loss, {kind}"].items()}
    means = {NAMES[method]: whole(rows) for method, rows in losses.items()}
    means |= {name: whole(rows) for name in LONGER if (rows := stored(results[f"loss, {kind}, {name}"]))}
    yield Table(
        f"{kind.capitalize()}, mean over the seeds that reach the longest context:",
        ["", "seeds", *HEAD[1:]],
        [
            [name, ", ".join(map(str, seeds))]
            + [number(statistics.mean(columns[L]) if L in columns else None) for L in LENGTHS]
            for name, (seeds, columns) in means.items()
        ],
    )
    pairs = [("e2e", m) for m in losses if m != "e2e"] + [("full", "swa")]
    yield Table(
        f"{kind.capitalize()}, differences at equal seeds: mean (range; number of seeds):",
        HEAD,
        [
            [f"{NAMES[a]} − {NAMES[b]}", *(spread(minus(losses[a], losses[b]), L) for L in LENGTHS)]
            for a, b in pairs
            if a in losses and b in losses
        ],
    )
    yield Table(
        f"{kind.capitalize()}, every run:",
        HEAD,
        [
            [f"{NAMES[m]}, seed {seed}", *(number(row.get(L)) for L in LENGTHS)]
            for m, rows in losses.items()
            for seed, row in rows.items()
        ],
    )


def by_index(results: Data, kind: str) -> Table:
    bins = {
        name: {seed: results[key] for seed in SEEDS if (key := f"by index, {kind}, {name}, seed {seed}") in results}
        for name in READINGS
    }
    seeds = list(bins["SWA"])
    positions = list(bins["SWA"][seeds[0]])
    return Table(
        f"{kind.capitalize()}, by token index in stretches of 32K, mean of {named(seeds)}:",
        ["", *positions],
        [
            [name, *(number(statistics.mean(row[position] for row in rows.values())) for position in positions)]
            for name, rows in bins.items()
        ],
    )


def plots(found: Results) -> Iterator[Plot]:
    results = {kind: {m: rows for m in METHODS if (rows := by_seed(found, m, kind))} for kind in KINDS}
    longer = {kind: {name: by_seed(found, m, kind) for name, m in LONGER.items()} for kind in KINDS}
    relative = [relative_panel(kind, results[kind], longer[kind]) for kind in KINDS]
    yield Plot("context", "Loss minus SWA's by context length", relative)
    yield Plot("loss", "Loss by context length", [absolute_panel(kind, results[kind]) for kind in KINDS])
    yield Plot(
        "index", "Loss minus SWA's by token index in stretches of 32K", [index_panel(found, kind) for kind in KINDS]
    )


def read_by_index(found: Results, kind: str) -> list[int]:
    """The seeds of which every reading in stretches of 32K is there."""
    what = f"{kind}-32"
    return [s for s in SEEDS if all(found.bins(job(m, s, 32), what, reading) for m, reading in READINGS.values())]


def forgotten(found: Results, method: str, kind: str) -> BySeed:
    """How much an extension has lost of what the model that it started from could do."""
    change: BySeed = {}
    for seed in SEEDS:
        base, extension, what = job(method, seed, 1), job(method, seed, 32), f"{kind}-1"
        before, after = found.loss_before(base, extension, what), found.loss(extension, what)
        if before is not None and after is not None:
            change[seed] = {1: after - before}
    return change


def absolute_panel(kind: str, losses: dict[str, BySeed]) -> Chart:
    """TTT-E2E, full attention and SWA: each seed, and the mean at the lengths that all seeds of all three have."""
    shown = {method: losses.get(method, {}) for method in ("e2e", "full", "swa")}
    common = set(LENGTHS).intersection(*(row for rows in shown.values() for row in rows.values()))
    lines = []
    for method, rows in shown.items():
        lines += [Line(NAMES[method], [(L * UNIT, y) for L, y in row.items()], faint=True) for row in rows.values()]
        mean = line(NAMES[method], {seed: {L: row[L] for L in sorted(common)} for seed, row in rows.items()})
        lines.append(Line(mean.label, mean.points))
    return panel(TITLES[kind], lines, unit_of(kind), "context length, tokens", ticks=TICKS)


def relative_panel(kind: str, losses: dict[str, BySeed], longer: dict[str, BySeed]) -> Chart:
    """Means over seeds; the range only of TTT-E2E and full attention, because eight of them hide each other."""
    lines = []
    for name, rows in longer.items():
        mean = line(name, minus(rows, losses.get("swa", {})))
        lines.append(Line(name, mean.points))
    for method, rows in losses.items():
        if method != "swa":
            mean = line(NAMES[method], minus(rows, losses.get("swa", {})))
            lines.append(mean if method in ("e2e", "full") else Line(mean.label, mean.points))
    title = f"{TITLES[kind]}: loss minus SWA's, same seed"
    return panel(title, lines, unit_of(kind), "context length, tokens", zero="SWA", ticks=TICKS)


def index_panel(found: Results, kind: str) -> Chart:
    """Loss minus SWA's of the same seed, mean over seeds."""
    what = f"{kind}-32"
    lines = []
    for name, (method, reading) in READINGS.items():
        curves = []
        for seed in read_by_index(found, kind):
            swa = dict(found.curve(job("swa", seed, 32), what))
            curve = found.curve(job(method, seed, 32), what, reading)
            curves.append([(x, y - swa[x]) for x, y in curve if x >= 128])
        if method != "swa":
            lines.append(mean_line(name, curves))
    title = f"{TITLES[kind]}: loss minus SWA's, same seed"
    ticks = [128, 512, 2048, 8192, 32768]
    return panel(title, lines, unit_of(kind), "token index", zero="SWA", ticks=ticks)
