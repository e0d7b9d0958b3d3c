"""How well models continue a text, as other models judge it."""

from __future__ import annotations

from experiments.page import Page, interval, mean
from experiments.results import Results

NEEDS = ()


def make(found: Results) -> Page:
    page = Page("decoding", "How well models continue a text", "Judged by other models' loss.")
    for name in sorted(found.evaluations):
        content = found.evaluations[name].get("judge")
        if content is None:
            continue
        rows, head = [], []
        for verdict in content["verdicts"]:
            entries = [entry for entry in verdict["by_position"] if entry["start"] >= content["prompt_tokens"]]
            head = [f"{entry['start']}–{entry['end']}" for entry in entries]
            title = f"{verdict['writer']}, {verdict['reading']}"
            page.results[f"{title} (judge {content['judge']})"] = {k: v for k, v in verdict.items() if k != "seconds"}
            positions = (mean(entry["score"]["nats_per_token"]) for entry in entries)
            whole = interval(verdict["continuation"]["nats_per_token"])
            rows.append([title, *positions, whole, f"{verdict['repeated']['mean']:.1%}"])
        page.table(f"Nats per token by position, judge {content['judge']}:", ["", *head, "all", "repeated"], rows)
    return page
