"""How well models continue a text, as other models judge it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.page import Data, Plot, Table, interval, mean
from experiments.results import Results

SLUG = "decoding"
HEADING = """# How well models continue a text

Judged by other models' loss."""
NEEDS = ()


def gather(found: Results) -> dict[str, Any]:
    results = {}
    for name in sorted(found.evaluations):
        content = found.evaluations[name].get("judge", {"verdicts": ()})
        for verdict in content["verdicts"]:
            title = f"{verdict['writer']}, {verdict['reading']} (judge {content['judge']})"
            kept = {key: value for key, value in verdict.items() if key != "seconds"}
            results[title] = {"judge": content["judge"], "prompt_tokens": content["prompt_tokens"]} | kept
    return results


def tables(results: Data) -> Iterator[Table]:
    for judge in dict.fromkeys(verdict["judge"] for verdict in results.values()):
        rows, head = [], []
        for verdict in results.values():
            if verdict["judge"] == judge:
                entries = [entry for entry in verdict["by_position"] if entry["start"] >= verdict["prompt_tokens"]]
                head = [f"{entry['start']}–{entry['end']}" for entry in entries]
                positions = (mean(entry["score"]["nats_per_token"]) for entry in entries)
                whole = interval(verdict["continuation"]["nats_per_token"])
                title = f"{verdict['writer']}, {verdict['reading']}"
                rows.append([title, *positions, whole, f"{verdict['repeated']['mean']:.1%}"])
        yield Table(f"Nats per token by position, judge {judge}:", ["", *head, "all", "repeated"], rows)


def plots(found: Results) -> Iterator[Plot]:
    yield from ()
