"""The figures of `serving_waits` as a page, beside those of another checkout."""

from __future__ import annotations

import json
from typing import Any

_FIRST = ("create", "get", "list", "label", "first token", "next token")


def write_page(after: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Markdown; figures of both stand as before → after. A kind of call that one of them lacks is left out."""
    runs = [after] if before is None else [before, after]
    lines = [f"# How long clients of a server wait, {after['date']}", ""]
    for name, run in zip(("Before", "After") if before else ("Measured",), runs, strict=True):
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        lines += [f"{name}: commit {run['commit']}, `{run['command']}`, {versions}, {json.dumps(run['hardware'])}.", ""]
    processors = f"on {after['hardware']['threads']} threads, its clients on the same processors"
    lines += [f"{after['model']} {processors}; one run each. Times are milliseconds, n counts calls.", ""]
    lines += ["| | | n | p50 | p99 | longest | p99, times |", "|---|---|--:|--:|--:|--:|--:|"]
    for phase in after["phases"]:
        waits = [run["phases"][phase]["waits"] for run in runs]
        for what in sorted(set.intersection(*map(set, waits)), key=_place):
            found = [of[what] for of in waits]
            cells = [_both(found, "n", 1), *(_both(found, name, 1000) for name in ("p50", "p99", "max"))]
            times = f"{found[-1]['p99'] / found[0]['p99']:.3f}" if before else ""
            lines.append(f"| {phase} | {what} | {' | '.join(cells)} | {times} |")
    lines += ["", "| tokens per second | read | written | both, times |", "|---|--:|--:|--:|"]
    for phase in after["phases"]:
        rates = [run["phases"][phase].get("tokens_per_second") for run in runs]
        if None not in rates:
            times = f"{sum(rates[-1].values()) / sum(rates[0].values()):.3f}" if before else ""
            lines.append(f"| {phase} | {_both(rates, 'read', 1)} | {_both(rates, 'written', 1)} | {times} |")
    memory = [run["memory"] for run in runs]
    resident, most = (_both(memory, name, 1) for name in ("resident", "most"))
    lines += ["", f"Resident memory of the server: {resident} MiB at the end, {most} at most."]
    growth = " → ".join(
        f"{phase['memory_growth']:.3f}" for run in runs for phase in run["phases"].values() if "memory_growth" in phase
    )
    lines.append(f"Of the load, the last quarter held {growth} times the second.")
    lines += ["", *_aims(after, before), *(f"\n**Wrong:** {problem}" for run in runs for problem in run["problems"])]
    return "\n".join(lines) + "\n"


def _aims(after: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What was asked for, and what was found."""
    phases = after["phases"]
    waits = phases["beside a reader"]["waits"]
    mini_batch = after["mini_batch_size"] / phases["reading"]["tokens_per_second"]["read"]
    lines = ["| aim | found | |", "|---|--:|---|"]
    for what, most in (
        ("create", 0.1),
        ("get", 0.1),
        ("next token", max(3 * waits["next token"]["p50"], mini_batch)),
    ):
        found = waits[what]["p99"]
        lines.append(
            f"| {what} beside a reader: p99 at most {1e3 * most:.0f} ms | {1e3 * found:,.1f} | {_met(found <= most)} |"
        )
    for phase in phases if before else ():
        if "tokens_per_second" in phases[phase]:
            now, then = (sum(run["phases"][phase]["tokens_per_second"].values()) for run in (after, before))
            lines.append(
                f"| {phase}: tokens per second at least 0.95 times | {now / then:.3f} | {_met(now >= 0.95 * then)} |"
            )
    return [*lines, "", f"Of the next token: three times its p50, or the {1e3 * mini_batch:.0f} ms of a mini-batch."]


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _place(what: str) -> tuple[int, int, str]:
    return (_FIRST.index(what) if what in _FIRST else len(_FIRST), len(what), what)


def _both(found: list[dict[str, float]], name: str, unit: float) -> str:
    """One figure of every run."""
    values = [unit * of[name] for of in found]
    return " → ".join(f"{value:,.1f}" if name != "n" and value < 100 else f"{value:,.0f}" for value in values)
