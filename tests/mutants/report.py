"""The page of two runs, before and after: scores, and every fault that survived with the reason why it may."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from .reasons import Reasons, known_reasons, reason_of
from .run import folder_of

State = dict[str, Any]
TOLD = """\
Small faults are put into the files one at a time: another operator or constant, a condition turned round, a call, an \
argument, an assignment or a refusal left out. A fault is killed if one of the tests that run the changed line fails. \
`make mutants` makes the numbers; `tests/mutants/targets.toml` names the files and their tests."""


def scores(state: State) -> dict[str, Counter[str]]:
    """How many of each status a part of the library has; `all` is the last."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for fault in sorted(state["faults"].values(), key=lambda fault: folder_of(fault["file"])):
        counts[folder_of(fault["file"])][fault["status"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    return counts


def cell(count: Counter[str]) -> str:
    """`killed of all, score`."""
    total = sum(count.values())
    return f"{count['killed']} of {total} | {count['killed'] / total:.1%}" if total else "– | –"


def page(before: State, after: State, reasons: Reasons) -> str:
    """Markdown. A reason that belongs to no fault is a slip, and ends the program once every fault is judged."""
    lines = [
        "# Mutation score",
        "",
        TOLD,
        "",
        f"Before: {before['commit']}. After: {after['commit']}. Python {after['python']}, torch {after['torch']}.",
        "",
        "| part | killed before | score | killed after | score |",
        "|---|--:|--:|--:|--:|",
    ]
    earlier, later = scores(before), scores(after)
    lines += [f"| {part} | {cell(earlier[part])} | {cell(later[part])} |" for part in later]
    survivors = [fault for fault in after["faults"].values() if fault["status"] == "survived"]
    used: set[tuple[str, str, str]] = set()
    rows = []
    for fault in sorted(survivors, key=lambda fault: (fault["file"], fault["line"])):
        name, reason = reason_of(reasons, fault)
        if reason:
            used.add((fault["file"], fault["function"], name))
        where = f"{fault['file'].removeprefix('src/longread/')}:{fault['line']} `{fault['function']}`"
        rows.append(f"| {where} | {code(fault['before'])} | {code(fault['after'])} | {reason or 'not yet killed'} |")
    given = {(file, function, name) for file, of in reasons.items() for function, to in of.items() for name in to}
    judged = len(after["faults"])
    if given - used and judged == after.get("places", judged):
        sys.exit(f"reasons for no fault that survived: {sorted(given - used)}")
    lines += carried(before["commit"], after)
    lines += ["", f"## The {len(rows)} that survive", "", "| where | is | would be | why it may |", "|---|---|---|---|"]
    return "\n".join([*lines, *rows]) + "\n"


def carried(first: str, after: State) -> list[str]:
    """What the page says of verdicts that come from an earlier run; `first` is the commit of the one before."""
    faults = [*after["faults"].values()]
    earlier = [fault for fault in faults if fault.get("since") == first]
    killed = sum(fault["status"] == "killed" for fault in earlier)
    survived = sum(fault["status"] == "survived" and not fault.get("excused") for fault in earlier)
    unjudged = after.get("places", len(faults)) - len(faults)
    lines = []
    if killed:
        lines.append(
            f"{killed} faults are taken from the run before as killed: their functions have not changed since, and the "
            "tests that killed them are still there."
        )
    if survived:
        lines.append(f"{survived} survivors of the run before were not judged again by the tests added since.")
    if unjudged:
        lines.append(f"{unjudged} faults of functions that have changed were not judged, and count for nothing here.")
    return [line for text in lines for line in ("", text)]


def code(text: str) -> str:
    """In a cell of a table."""
    short = " ".join(text.split())
    short = short if len(short) <= 80 else short[:77] + "..."
    return f"`{short}`".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.report", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "page", type=Path, help="benchmarks/results/mutants_<date>.md; a .json of the same name goes with it"
    )
    options = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    options.page.write_text(page(before, after, known_reasons()))
    kept = {
        when: {
            **{name: value for name, value in state.items() if name != "faults"},
            "scores": scores(state),
            "survivors": [fault for fault in state["faults"].values() if fault["status"] == "survived"],
        }
        for when, state in (("before", before), ("after", after))
    }
    options.page.with_suffix(".json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
