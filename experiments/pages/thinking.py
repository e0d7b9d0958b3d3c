"""Agents that think before they act: from what `experiments.thinking` left. The unit of every interval is an agent with
its own world model: seed × withheld combination."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from experiments.figures import panel
from experiments.page import Data, Plot, Table

from longread.evaluate import Chart, Line

SLUG = "thinking"
HEADING = """# Agents that think before they act

Does thinking in a learned world model solve combinations that were withheld from training? What adds what?

![A board, eight imagined trials, and the real one](thought.svg)"""
AT_ONCE, MODEL, SIMULATOR = "acts at once", "thinks in its world model", "thinks in the simulator"
_T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262, 15: 2.145, 20: 2.093, 25: 2.064, 30: 2.045}
"""Student's t at 97.5 %, by the number of units."""
SELECTIONS = ("random", "gap", "gap-fresh", "learnability", "gap_unsolved", "sequence_gap")
BUDGETS = (1250, 2500)
LONG = (("random", "as it is"), ("swapped", "with a quarter of slow logits swapped"))
MOST_WITHHELD, LEAST_SEEN = 0.2, 0.5


def mean(values: Sequence[float]) -> str:
    """Mean and half-width of its 95 % interval."""
    if len(values) < 2:
        return f"{statistics.mean(values):.3f}" if values else "–"
    quantile = _T_QUANTILES[max(n for n in _T_QUANTILES if n <= len(values))]  # of fewer units: a little too wide
    return f"{statistics.mean(values):.3f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def tables(results: Data) -> Iterator[Table]:
    jobs = results["results"]
    made = [_conditions(jobs), _novelty(jobs), _coverage(jobs["main"])] if "main" in jobs else []
    yield from (table for table in (*made, _selection(jobs), _long(jobs)) if table.rows)


def _conditions(jobs: Data) -> Table:
    main = jobs["main"]
    rows = [
        [
            "a plan at random",
            f"{statistics.mean(main['chance'].values()):.3f}",
            f"{statistics.mean(main['chance'].values()):.3f}",
        ]
    ]
    rows.append(["reactive, trained on plans found by brute force", *_both(main["cloning"])])
    rows += [[name, *_both(rates)] for name, rates in main["success"].items()]
    for job, said in (("fast-mlp", "memory a fast MLP"), ("recurrent", "recurrent agent")):
        if job in jobs:
            rows += [[f"{said}: {name}", *_both(jobs[job]["success"][name])] for name in (AT_ONCE, MODEL)]
    return Table("Success of one real trial on the clean test, K = 8:", ["", "withheld", "seen"], rows)


def _both(rates: Data) -> list[str]:
    return [mean(rates[part]) for part in ("withheld", "seen")]


def _novelty(jobs: Data) -> Table:
    """The swap control: the same boards, for agents that saw the combination and for those that did not."""
    rows = []
    for job, seed in (("tuned", 0), ("main", 1)):
        if job not in jobs:
            continue
        found = jobs[job]
        for triple, rates in found["by set"].items():
            own = [i for i, withheld in enumerate(found["withheld"]) if withheld == triple]
            others = [i for i in range(len(found["withheld"])) if i not in own]
            parts = {name: [[rates[name][i] for i in which] for which in (own, others)] for name in (AT_ONCE, MODEL)}
            at_once, seen = (statistics.mean(part) for part in parts[AT_ONCE])
            verdict = "novel" if at_once <= MOST_WITHHELD and seen >= LEAST_SEEN else "hard, not novel"
            quality = [mean([found[name][i] for i in own]) for name in ("recall", "precision")]
            cells = [mean(parts[AT_ONCE][0]), mean(parts[AT_ONCE][1]), mean(parts[MODEL][0]), mean(parts[MODEL][1])]
            rows.append([f"{triple}, permutation seed {seed}", *cells, *quality, verdict])
    head = ["boards of", "K = 0, withheld", "K = 0, seen", "K = 8, withheld", "K = 8, seen", "recall", "precision", ""]
    return Table("The same boards for agents that saw the combination and for those that did not:", head, rows)


def _coverage(main: Data) -> Table:
    rows = [
        [f"{triple} withheld, family {'abcdefgh'[family]}", *(f"{count:,}" for count in counts)]
        for triple, families in main["coverage"].items()
        for family, counts in enumerate(families)
    ]
    tints = len(rows[0]) - 1
    head = ["", *(f"tint {tint}" for tint in range(tints))]
    return Table(
        "Transitions of each tint through each family, first boards of the world model's training:", head, rows
    )


def _selection(jobs: Data) -> Table:
    rows = []
    for world, prefix in (("3 curtain rows", ""), ("4 curtain rows, mostly empty", "rich-")):
        for rule in SELECTIONS:
            curve = {row["iteration"]: row for row in jobs.get(prefix + rule, {}).get("curve", [])}
            if all(budget in curve for budget in BUDGETS):
                at = [curve[budget] for budget in BUDGETS]
                cells = [mean(row[name]["withheld"]) for row in at for name in (AT_ONCE, SIMULATOR)]
                rows.append([f"{rule}, {world}", *cells, mean(at[-1][AT_ONCE]["seen"])])
    head = [
        "selection, world",
        *(f"K = {k}, {budget}" for budget in BUDGETS for k in (0, 8)),
        f"seen K = 0, {BUDGETS[-1]}",
    ]
    return Table("Success on withheld combinations by selection, after 1250 and 2500 of 2500 iterations:", head, rows)


def _long(jobs: Data) -> Table:
    rows = []
    for job, said in LONG:
        for row in jobs.get(job, {}).get("curve", []):
            if row["iteration"] % 500 == 0:
                cells = [mean(row[name][part]) for part in ("withheld", "seen") for name in (AT_ONCE, SIMULATOR)]
                rows.append([f"{said}, {row['iteration']}", *cells])
    head = ["training, iteration", "withheld, K = 0", "withheld, K = 8", "seen, K = 0", "seen, K = 8"]
    return Table("Long training, 2500 iterations, thinking in the simulator:", head, rows)


def plots(jobs: Data) -> Iterator[Plot]:
    if "random" in jobs:
        panels = [_training(jobs[name], title) for name, title in LONG
                  if name in jobs]  # fmt: skip
        yield Plot("training", "Success over training, to 2500 iterations", panels)
    if "main" in jobs:
        lines = [
            _with_range(said, jobs[job]["by trials"])
            for job, said in (("main", "fast weights"), ("fast-mlp", "fast MLP"), ("recurrent", "recurrent"))
            if job in jobs
        ]
        chart = panel("Withheld combinations", lines, "success", "mental trials", log=False, limits=(0, 1))
        yield Plot("trials", "Success by mental trials, range over agents", [chart])
        yield Plot("models", "Success by the world model's training", [_models(jobs["main"])])


def _training(job: Data, title: str) -> Chart:
    lines = []
    for name, condition in (("acts at once", AT_ONCE), ("thinks first", SIMULATOR)):
        for part in ("withheld", "seen"):
            points = [(row["iteration"], statistics.mean(row[condition][part])) for row in job["curve"]]
            lines.append(Line(f"{name}, {part}", points))
    return panel(f"Trained {title}", lines, "success", "iterations", log=False, limits=(0, 1))


def _with_range(name: str, agents: Sequence[Sequence[float]]) -> Line:
    columns = list(zip(*agents, strict=True))
    points = [(float(k), statistics.mean(column)) for k, column in enumerate(columns)]
    return Line(name, points, [(min(column), max(column)) for column in columns])


def _models(main: Data) -> Chart:
    found = {int(step): values for step, values in main["world models"].items()}
    steps = main["config"]["world_model"]["steps"]
    found[steps] = {
        "success": main["success"][MODEL]["withheld"],
        "recall": main["recall"],
        "precision": main["precision"],
    }
    lines = [
        Line(said, [(float(step), statistics.mean(found[step][name])) for step in sorted(found)])
        for name, said in (("success", "success"), ("recall", "recall of plans"), ("precision", "precision of plans"))
    ]
    return panel("Thinking in a model after so many steps", lines, "", "steps of the world model", log=False,
                 limits=(0, 1))  # fmt: skip
