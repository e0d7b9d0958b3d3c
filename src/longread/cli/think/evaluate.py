"""Evaluate an agent: at once, after thinking, and under every control, on boards that were withheld from it.

Example:
  longread think evaluate
  longread think evaluate runs/thinker --report runs/thinker.html --json runs/thinker.json
  longread think evaluate runs/thinker --damage 0.3
"""

from __future__ import annotations

import argparse
import json

from longread.cli.arguments import add_device, add_outputs, positive

NAME = "evaluate"


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
    from longread.cli.outputs import check_outputs, figure_outputs, progress_console, show_figures, write_text
    from longread.cli.think.figures import CHART, figures_of_report
    from longread.model import find_device
    from longread.thinking import BOXED, FORMAT, evaluate, open_thinker

    check_outputs(figure_outputs(options, FORMAT, [CHART]))
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
