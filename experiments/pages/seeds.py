"""Losses of several seeds: what is there of them, their differences, and means that compare like with like."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from experiments.pages import job
from experiments.plan import UNIT
from experiments.results import Results

from longread.evaluate import Line

SEEDS = (0, 1, 2)
LENGTHS = (1, 2, 4, 8, 16, 32)
BySeed = dict[int, dict[int, float]]
"""Seed -> context length in units -> loss; what was not measured is left out."""


def by_seed(found: Results, method: str, kind: str, reading: str | None = None) -> BySeed:
    rows: BySeed = {}
    for seed in SEEDS:
        for length in LENGTHS:
            loss = found.loss(job(method, seed, length), f"{kind}-{length}", reading)
            if loss is not None:
                rows.setdefault(seed, {})[length] = loss
    return rows


def stored(rows: Mapping[str, Mapping[str, float]]) -> BySeed:
    """What was stored as JSON, whose keys are text."""
    return {int(seed): {int(length): loss for length, loss in row.items()} for seed, row in rows.items()}


def minus(a: BySeed, b: BySeed) -> BySeed:
    """Differences at the seeds and lengths that both have."""
    return {s: {L: a[s][L] - b[s][L] for L in a[s] if L in b[s]} for s in a if s in b}


def whole(rows: BySeed) -> tuple[list[int], dict[int, list[float]]]:
    """The seeds that reach the longest length, and length -> their losses, at the lengths that all of them have.

    A mean over these has the same seeds at every length: seeds differ by more than lengths do.
    """
    longest = max((L for row in rows.values() for L in row), default=0)
    seeds = [s for s, row in rows.items() if longest in row]
    return seeds, {L: [rows[s][L] for s in seeds] for L in LENGTHS if seeds and all(L in rows[s] for s in seeds)}


def spread(rows: BySeed, length: int) -> str:
    """`−0.117 (−0.139 … −0.095; 3)`: mean, range and number of seeds."""
    found = [row[length] for row in rows.values() if length in row]
    if not found:
        return ""
    several = f"{min(found):+.3f} … {max(found):+.3f}; " if len(found) > 1 else ""
    return f"{statistics.mean(found):+.3f} ({several}{len(found)})".replace("-", "−")


def line(name: str, rows: BySeed) -> Line:
    """The mean by context length, and its range over seeds."""
    seeds, columns = whole(rows)
    points = [(L * UNIT, statistics.mean(values)) for L, values in columns.items()]
    return Line(name, points, [(min(values), max(values)) for values in columns.values()] if len(seeds) > 1 else None)


def mean_line(name: str, curves: Sequence[Sequence[tuple[float, float]]]) -> Line:
    """The mean of curves over the same positions, and its range."""
    columns = list(zip(*curves, strict=True))
    ys = [[y for _, y in column] for column in columns]
    points = [(column[0][0], statistics.mean(y)) for column, y in zip(columns, ys, strict=True)]
    return Line(name, points, [(min(y), max(y)) for y in ys] if len(curves) > 1 else None)


def named(seeds: Sequence[int]) -> str:
    """`seed 0`, `seeds 0, 1, 2`."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
