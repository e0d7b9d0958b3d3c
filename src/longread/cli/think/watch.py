"""Watch an agent think: the trials that it imagines on a board, then the only real one.

Example:
  longread think watch
  longread think watch runs/thinker --families abd --board 3 --report thought.html
"""

from __future__ import annotations

import argparse
import contextlib
import json

from longread.cli.arguments import add_device, add_json, positive

FORMAT = "longread-thought/1"
MOST_TRIALS = 64
MOST_BOARDS = 10_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the action."""
    parser.add_argument(
        "agent", nargs="?", default=None, metavar="AGENT", help="a run or an agent's file (default: the one in the box)"
    )
    parser.add_argument("--families", metavar="LETTERS", help="on the board (default: those that were withheld)")
    parser.add_argument("--board", type=positive, default=1, metavar="N", help="which of them (default 1, the first)")
    parser.add_argument("--trials", type=int, metavar="K", help="mental trials; 0: none (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, help="of boards and of what is tried (default 0)")
    add_json(parser, "the thought")
    parser.add_argument("--report", metavar="FILE", help="write an HTML page here")
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the action and returns its exit status."""
    from longread.cli.arguments import check_at_most
    from longread.cli.outputs import check_outputs, tables_console, write_text
    from longread.evaluate import html_page
    from longread.model import find_device
    from longread.thinking import BOXED, as_text, certified_set, html_sections, open_thinker, think

    check_outputs(options)
    check_at_most("--board", options.board, MOST_BOARDS, "boards")
    check_at_most("--trials", options.trials or 0, MOST_TRIALS, "trials")
    name = BOXED if options.agent is None else options.agent
    thinker = open_thinker(name, find_device(options.device))
    families = options.families or thinker.config.withheld
    boards = certified_set(thinker.world, families, options.board, options.seed)
    thought = think(thinker, boards.cells[options.board - 1], trials=options.trials, seed=options.seed)
    with contextlib.suppress(BrokenPipeError):
        tables_console(options).out(as_text(thought, thinker.world), highlight=False, end="")
    if options.json:
        write_text(options.json, json.dumps({"format": FORMAT, "families": families, **thought._asdict()}) + "\n")
    if options.report:
        seen = "withheld from its training" if families == thinker.config.withheld else "other than those withheld"
        lead = f"{name} on a board of the families {families}, {seen}: {len(thought.trials)} imagined trials, one real."
        page = html_page(html_sections(thought, thinker.world), title="An agent thinks, then acts", lead=lead)
        write_text(options.report, page)
    return 0
