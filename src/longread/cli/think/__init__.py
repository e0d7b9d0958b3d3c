"""Agents that think before they act: train one, evaluate it, watch it think.

They try plans in a learned model of their world, keep what they find in fast weights, and then act once in the world.
Trained on boards of marble runs from which one combination of elements was withheld (after arXiv 2503.19815).

Example:
  longread think watch
  longread think train --out runs/thinker
  longread think evaluate runs/thinker --report runs/thinker.html
"""

from __future__ import annotations

import argparse

from longread.cli.think import evaluate, train, watch

_ACTIONS = {"train": train, "evaluate": evaluate, "watch": watch}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the three actions and their options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action in _ACTIONS.items():
        summary, _, example = (action.__doc__ or "").partition("\n\n")
        added = actions.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_options(added)
        added.set_defaults(think=action.run)


def run(options: argparse.Namespace) -> int:
    """Runs the action and returns its exit status."""
    return int(options.think(options))
