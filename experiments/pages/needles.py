"""Needles in a haystack: what was found, and how many nats the right value would have cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.page import Data, Plot, Table, mean
from experiments.plan import UNIT
from experiments.results import Results

SLUG = "needles"
HEADING = """# Needles in a haystack

Is anything recalled beyond the window?"""
NEEDS = ()
KEYS = ("context_length", "inside_window", "outside_window", "value_nats_inside", "value_nats_outside")


def gather(found: Results) -> dict[str, Any]:
    results = {}
    for name in sorted(found.evaluations):
        for result in found.evaluations[name].get("needle", {}).get("results", []):
            for variant in sorted({entry["variant"] for entry in result["accuracy"]}):
                entries = [entry for entry in result["accuracy"] if entry["variant"] == variant]
                title = f"{result['model']}, {result['reading']}, {variant}"
                results[title] = [{key: entry.get(key) for key in KEYS} for entry in entries]
    return results


def tables(results: Data) -> Iterator[Table]:
    rows, head = [], []
    for title, entries in results.items():
        head = [f"{entry['context_length'] // UNIT}K" for entry in entries]
        found = [share for entry in entries for share in (entry["inside_window"], entry["outside_window"]) if share]
        right = sum(share["mean"] * share["n"] for share in found)
        nats = [f"{mean(entry['value_nats_inside'])} / {mean(entry['value_nats_outside'])}" for entry in entries]
        rows.append([title, f"{right:.0f} of {sum(share['n'] for share in found)}", *nats])
    yield Table(
        "Found, and nats to spell the value, needle inside / outside the last 1024 tokens:", ["", "found", *head], rows
    )


def plots(found: Results) -> Iterator[Plot]:
    yield from ()
