"""Speculative decoding with a drafter that learns, from the files of `benchmarks.speculative`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.page import Data, Table

SLUG = "speculative-decoding"
PAIRS = {"verifier-python": "Python", "verifier-books": "Books", "python": "Python", "books": "Books"}
"""Of each file, the text that its drafter and verifier read."""
COLUMNS = {
    "overlap, learning": ("overlap_learning", 3),
    "frozen": ("overlap_frozen", 3),
    "gained by learning": ("overlap_gained", 3),
    "accepted a round, learning": ("accepted_learning", 2),
    "accepted a round, frozen": ("accepted_frozen", 2),
}


def tables(files: Data) -> Iterator[Table]:
    for name, text in PAIRS.items():
        yield _table(f"{text} ([{name}.json]({name}.json)):", files[name]["rows"], len(COLUMNS))
    yield _table("The two models of `make demo-train` ([demo.json](demo.json)):", files["demo"]["rows"], 3)


def _table(caption: str, measured: list[dict[str, Any]], count: int) -> Table:
    columns = dict(list(COLUMNS.items())[:count])
    rows = [
        [f"{row['position']:,}", *(_with_half_width(row[key], digits, key) for key, digits in columns.values())]
        for row in measured
    ]
    return Table(caption, ["position", *columns], rows)


def _with_half_width(estimate: dict[str, float], digits: int, key: str) -> str:
    """Mean ± half of the interval; a difference has its sign."""
    sign = "+" if key == "overlap_gained" else ""
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{estimate['mean']:{sign}.{digits}f} ± {half:.{digits}f}".replace("-", "−")
