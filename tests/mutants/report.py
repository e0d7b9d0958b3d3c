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
    """How many of each status a part of the library has; `all` is the last. A page keeps no more of a run than that."""
    if "faults" not in state:
        return {part: Counter(count) for part, count in state["scores"].items()}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for fault in sorted(state["faults"].values(), key=lambda fault: folder_of(fault["file"])):
        counts[folder_of(fault["file"])][fault["status"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    return counts


def survivors_of(state: State) -> list[dict[str, Any]]:
    """The faults that no test noticed."""
    if "faults" not in state:
        return list(state["survivors"])
    return [fault for fault in state["faults"].values() if fault["status"] == "survived"]


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
    survivors = survivors_of(after)
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
    open_ = sum(not reason_of(reasons, fault)[1] for fault in survivors)
    lines += ["", f"## The {len(rows)} that survive, {open_} of them without a reason yet"]
    lines += ["", "| where | is | would be | why it may |", "|---|---|---|---|"]
    return "\n".join([*lines, *rows]) + "\n"


def carried(first: str, after: State) -> list[str]:
    """What the page says of verdicts that come from earlier runs; `first` is the commit of the one before."""
    faults = [*after["faults"].values()]
    lines = []
    for commit in sorted({fault["since"] for fault in faults if "since" in fault}):
        known = after.get("taken", {}).get(commit)
        machine = f" (Python {known['python']}, torch {known['torch']})" if known else ""
        run = ("the run before" if commit == first else f"a run of {commit}") + machine
        earlier = [fault for fault in faults if fault.get("since") == commit]
        killed = sum(fault["status"] == "killed" for fault in earlier)
        excused = sum(fault["status"] == "survived" and bool(fault.get("excused")) for fault in earlier)
        survived = sum(fault["status"] == "survived" for fault in earlier) - excused
        if known and commit != first:
            count = Counter({status: known.get(status, 0) for status in ("killed", "survived")})
            lines.append(
                f"{run[0].upper()}{run[1:]} of all faults of that tree had killed {cell(count)}.".replace(" |", ",")
            )
        if killed:
            lines.append(
                f"{killed} faults are taken from {run} as killed: their functions have not changed since, and the "
                "tests that killed them are still there."
            )
        if excused:
            lines.append(f"{excused} survivors of {run} that may survive, as a reason says, were not judged again.")
        if survived:
            lines.append(f"{survived} survivors of {run} were not judged again by the tests added since.")
    some = sum(fault["status"] == "survived" and "met" in fault for fault in faults)
    if some:
        lines.append(
            f"{some} of the survivors met only some of the tests here (`--tests`), those that were new or nearest to "
            "them."
        )
    unjudged = after.get("places", len(faults)) - len(faults)
    if unjudged:
        lines.append(
            f"{unjudged} faults of functions that are new or have changed were not judged, and count for nothing here."
        )
    return [line for text in lines for line in ("", text)]


def code(text: str) -> str:
    """In a cell of a table."""
    short = " ".join(text.split())
    short = short if len(short) <= 80 else short[:77] + "..."
    return f"`{short}`".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.report", description=__doc__)
    parser.add_argument("before", type=Path, help="results, or the .json of a page: its own `before` is taken")
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "page", type=Path, help="benchmarks/results/mutants_<date>.md; a .json of the same name goes with it"
    )
    options = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    before = before.get("before", before)
    options.page.write_text(page(before, after, known_reasons()))
    kept = {
        when: {
            **{name: value for name, value in state.items() if name != "faults"},
            "scores": scores(state),
            "survivors": survivors_of(state),
        }
        for when, state in (("before", before), ("after", after))
    }
    options.page.with_suffix(".json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
