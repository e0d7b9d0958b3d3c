"""Figures of a page whose jobs ran at different times: rows of a later run join those that the page has.

    results["runs"]                 what is known of each run (`Results.run`), the first one first
    results["run of"][table][row]   which of them measured a row, counted from 0
    results["earlier"][table][row]  what a later run has measured again, as [run, row] each

A table here is a part of results.json that holds rows by name, of one job each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.page import Data, Table

RUNS, RUN_OF, EARLIER = "runs", "run of", "earlier"
Rows = Mapping[str, Sequence[str]]
"""Table -> names of its rows, in the order of the page; others follow."""
KNOWN = ("commit", "started", "gpus", "torch")
HASH, SHORT_HASH = 40, 9


def merged(before: Data, new: Data, run: Data, rows: Rows) -> dict[str, Any]:
    """The tables of `before`, with rows that `run` measured in `new`.

    A row is of one run as a whole. The later one counts, unless it lacks something that the earlier one has.
    """
    runs: list[Any] = list(before.get(RUNS, []))
    if run not in runs:
        runs.append(run)
    number = runs.index(run)
    results: dict[str, Any] = {RUNS: runs, RUN_OF: {}, EARLIER: {}}
    for table, order in rows.items():
        found, added = dict(before.get(table, {})), new.get(table, {})
        run_of = dict(before.get(RUN_OF, {}).get(table, {}))
        earlier = {name: list(entries) for name, entries in before.get(EARLIER, {}).get(table, {}).items()}
        for name, row in added.items():
            old = found.get(name)
            known = old == row or [number, row] in earlier.get(name, [])
            if known or (old is not None and not covers(row, old)):
                continue
            if old is not None and run_of.get(name) != number:
                earlier.setdefault(name, []).append([run_of.get(name), old])
            found[name], run_of[name] = row, number
        names = [*(name for name in order if name in found), *(name for name in found if name not in order)]
        results[table] = {name: found[name] for name in names}
        results[RUN_OF][table] = {name: run_of[name] for name in names if name in run_of}
        results[EARLIER] |= {table: earlier} if earlier else {}
    used = {number for of in results[RUN_OF].values() for number in of.values()}
    return results if number in used or number < len(before.get(RUNS, [])) else dict(before)


def covers(row: Any, old: Any) -> bool:
    """Whether a row has every entry that an older one has."""
    if not isinstance(old, Mapping):
        return not isinstance(row, Mapping)
    return isinstance(row, Mapping) and all(key in row and covers(row[key], value) for key, value in old.items())


def runs_table(results: Data) -> Iterator[Table]:
    """Which rows are of which run, where there are several: `Runs, and the rows that are of each:`."""
    runs = results.get(RUNS, [])
    if len(runs) < 2:
        return
    rows = []
    for number, run in enumerate(runs):
        gpus = run.get("gpus") or []
        known = run | {"gpus": f"{len(gpus)} × {gpus[0]}" if gpus else None}
        if len(known.get("commit") or "") == HASH:
            known["commit"] = known["commit"][:SHORT_HASH]
        of = {table: [name for name, n in each.items() if n == number] for table, each in results[RUN_OF].items()}
        named = "; ".join(f"{table}: {', '.join(names)}" for table, names in of.items() if names)
        rows.append([str(number + 1), *(known.get(key) or "" for key in KNOWN), named])
    yield Table("Runs, and the rows that are of each:", ["", *KNOWN, "rows"], rows)
