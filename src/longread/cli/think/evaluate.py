"""Evaluate an agent: at once, after thinking, and under every control, on boards that were withheld from it.

Example:
  longread think evaluate
  longread think evaluate runs/thinker --report runs/thinker.html --json runs/thinker.json
  longread think evaluate runs/thinker --damage 0.3
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from longread.cli.arguments import add_device, add_outputs, positive

if TYPE_CHECKING:
    from longread.evaluate import Figures
    from longread.thinking import Report

CHART = "trials"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the action."""
    parser.add_argument(
        "agent", nargs="?", default=None, metavar="AGENT", help="a run or an agent's file (default: the one in the box)"
    )
    parser.add_argument("--boards", type=positive, default=400, metavar="N", help="of each combination (default 400)")
    parser.add_argument("--tries", type=positive, default=4, metavar="N", help="of each board (default 4)")
    parser.add_argument("--trials", type=positive, metavar="K", help="mental trials (default: as in training)")
    parser.add_argument("--damage", type=float, default=0.0, metavar="NOISE", help="spoil the world model's weights")
    parser.add_argument("--only-withheld", action="store_true", help="leave out the combinations seen in training")
    parser.add_argument("--seed", type=int, default=0, help="of boards and luck (default 0)")
    add_outputs(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the action and returns its exit status."""
    from longread.cli.outputs import check_figures, progress_console, show_figures, write_text
    from longread.model import find_device
    from longread.thinking import BOXED, evaluate, open_thinker

    check_figures(options, [CHART])
    name = BOXED if options.agent is None else options.agent
    thinker = open_thinker(name, find_device(options.device))
    with progress_console(options).status(f"{name}: every plan on {options.boards} boards, imagined"):
        report = evaluate(
            thinker,
            boards=options.boards,
            tries=options.tries,
            trials=options.trials,
            seen=not options.only_withheld,
            damage=options.damage,
            seed=options.seed,
        )
    if options.json:
        write_text(options.json, json.dumps(report.as_dict(), indent=2) + "\n")
    lead = f"{name}, {thinker.num_parameters:,} parameters, {thinker.config.withheld} withheld from its training."
    show_figures(options, figures_of_report(report), title="Thinking before acting", lead=lead)
    return 0


def figures_of_report(report: Report) -> Figures:
    """Success under every condition, and by the number of mental trials."""
    from longread.evaluate import Chart, Figures, Grid, Line
    from longread.thinking.conditions import AT_ONCE, MODEL, SIMULATOR

    found = report.of_withheld
    conditions = Grid(
        f"Success of one real trial, {found.boards} boards of {report.withheld} × {found.tries} tries, "
        f"K = {found.trials}",
        "condition",
        ["success", "real drops"],
        [("a plan at random", [f"{found.chance:.3f}", "–"])]
        + [(name, [f"{float(rate):.3f}", f"{found.drops[name]:,}"]) for name, rate in found.success.items()],
    )
    names = [name for name in (AT_ONCE, MODEL, SIMULATOR) if name in found.success]
    rows = []
    for families, other in report.evaluations.items():
        cells = [f"{float(other.success[name]):.3f}" for name in names]
        cells += [f"{float(other.quality.recall):.3f}", f"{float(other.quality.precision):.3f}"]
        rows.append((f"{families}, {'withheld' if families == report.withheld else 'seen'}", cells))
    combinations = Grid(
        "By combination; recall and precision: of winning plans, by the world model",
        "families",
        [*names, "recall", "precision"],
        rows,
    )
    charts = []
    if found.by_trials is not None:
        points = [(float(k), rate) for k, rate in enumerate(found.by_trials[0].tolist())]
        line = Line(f"{report.withheld}, withheld", points)
        charts = [Chart(CHART, "Success by mental trials", "mental trials", "success", [line], log_x=False)]
    return Figures([conditions, combinations], charts, report.reasons())
