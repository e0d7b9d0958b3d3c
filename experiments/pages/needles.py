"""Needles in a haystack: what was found, and how many nats the right value would have cost."""

from __future__ import annotations

from experiments.page import Page, mean
from experiments.plan import UNIT
from experiments.results import Results

NEEDS = ()
KEYS = ("context_length", "inside_window", "outside_window", "value_nats_inside", "value_nats_outside")


def make(found: Results) -> Page:
    page = Page("needles", "Needles in a haystack", "Is anything recalled beyond the window?")
    rows, head = [], []
    for name in sorted(found.evaluations):
        for result in found.evaluations[name].get("needle", {}).get("results", []):
            for variant in sorted({entry["variant"] for entry in result["accuracy"]}):
                entries = [entry for entry in result["accuracy"] if entry["variant"] == variant]
                head = [f"{entry['context_length'] // UNIT}K" for entry in entries]
                title = f"{result['model']}, {result['reading']}, {variant}"
                page.results[title] = [{key: e.get(key) for key in KEYS} for e in entries]
                right = sum(e["all"]["mean"] * e["all"]["n"] for e in entries)
                nats = [f"{mean(e.get('value_nats_inside'))} / {mean(e.get('value_nats_outside'))}" for e in entries]
                rows.append([title, f"{right:.0f} of {sum(e['all']['n'] for e in entries)}", *nats])
    page.table(
        "Found, and nats to spell the value, needle inside / outside the last 1024 tokens:",
        ["", "found", *head],
        rows,
    )
    return page
