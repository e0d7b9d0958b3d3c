"""A pretrained model that becomes a reader, beside its twins: from what `longread evaluate` and `longread train` wrote.

results.json beside the page keeps, of each run, the command, the rows of speed, and the loss at each position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.page import Data, Table, number

SLUG = "pretrained"
POSITIONS = {
    "0–1K": ("0-128", "128-256", "256-512", "512-1024"),
    "1–2K": ("1024-2048",),
    "2–4K": ("2048-4096",),
    "4–8K": ("4096-8192",),
    "8–16K": ("8192-16384",),
    "16–32K": ("16384-32768",),
    "32–64K": ("32768-65536",),
    "64–128K": ("65536-131072",),
}
"""Columns, and the bins of tokens that each is the mean of."""
LEARNERS = ("reader", "reader, seed 1", "first-order", "first-order, equal time", "reader, 15 blocks, 57.7M tokens")

SUMMARY = ("full-attention twin", "SWA twin", "reader", "first-order, equal time", "SWA twin, 57.7M tokens")


def tables(files: Data) -> Iterator[Table]:
    runs = files["results"]["runs"]
    head = ["model, reading", *POSITIONS, "trained on"]
    losses = []
    for name, run in runs.items():
        for reading, found in run["readings"].items():
            said = name if reading == "static" else f"{name}, {reading}"
            losses.append([said, *(number(loss_at(found, of)) for of in POSITIONS), _tokens(run)])
    yield Table("Nats per token, seven validation books to 128K tokens:", head, losses)
    gains = []
    for name in LEARNERS:
        learning, frozen = (runs[name]["readings"][reading] for reading in ("learning", "frozen"))
        gained = [loss_at(frozen, of) - loss_at(learning, of) for of in POSITIONS]
        gains.append([name, *(f"{gain:+.3f}".replace("-", "−") for gain in gained), _tokens(runs[name])])
    yield Table("What reading adds, frozen less learning:", head, gains)
    yield Table("Speed of training, 8 × 8192 tokens a step, on one H200:", _SPEED, list(_speeds(runs)))


def summary(files: Data) -> Table:
    """At every other octave, with what the training took: for who only looks at one table."""
    positions, rows = list(POSITIONS)[1::2], []
    for name in SUMMARY:
        run = files["results"]["runs"][name]
        reading = "learning" if "learning" in run["readings"] else "static"
        losses = (number(loss_at(run["readings"][reading], of)) for of in positions)
        rows.append([name, *losses, _tokens(run), f"{run['training']['seconds']:.0f}"])
    caption = "Nats per token by position, seven held-out books read to 128K tokens:"
    return Table(caption, ["", *positions, "trained on", "seconds"], rows)


_SPEED = ["model", "tokens", "seconds", "tokens/s, median", "lowest – highest", "GiB at most", "learning", "frozen"]
"""The last two: tokens a second of reading."""


def loss_at(reading: dict[str, Any], column: str) -> float:
    """The mean over the positions of a column; its bins count by their lengths."""
    total, tokens = 0.0, 0
    for name in POSITIONS[column]:
        start, end = map(int, name.split("-"))
        total += (end - start) * reading["by_position"][name]["mean"]
        tokens += end - start
    return total / tokens


def _tokens(run: dict[str, Any]) -> str:
    return f"{run['training']['tokens'] / 1e6:.1f}M" if "training" in run else "–"


def _speeds(runs: dict[str, Any]) -> Iterator[list[str]]:
    for name, run in runs.items():
        if "training" not in run:
            continue
        training, reading = run["training"], run["readings"]
        rate = training["tokens_per_second"]
        read = [reading.get(way, {}).get("tokens_per_second") for way in ("learning", "frozen")]
        read[1] = read[1] or reading.get("static", {}).get("tokens_per_second")
        cells = [_tokens(run), f"{training['seconds']:.0f}", f"{rate['median']:,.0f}"]
        cells.append(f"{rate['low']:,.0f} – {rate['high']:,.0f}")
        peak = training.get("peak_memory_bytes")
        cells.append(f"{peak / 2**30:.1f}" if peak else "–")
        yield [name, *cells, *(f"{speed:,.0f}" if speed else "–" for speed in read)]
