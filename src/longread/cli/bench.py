"""Measure speed and memory, after checking that the results are right.

Example:
  longread bench
  longread bench train prefill --sizes 3b --contexts 8192 131072 --json h200.json --report h200.md
  longread bench train --gpus 2 --sizes 760m --contexts 8192 --json h200.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import add_device, add_force, check_at_most, positive

if TYPE_CHECKING:
    from longread.bench import Outcome

MOST_REPEATS = 1000
PLOTS = ("prefill.svg", "training.svg", "decoding.svg", "first-read.svg", "first-token.svg")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "works", nargs="*", metavar="WORK", help="train, first-step, prefill, decode, first-read, first-token"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=[], metavar="SIZE", help="toy, small, 135m; 125m, 350m, 760m, 1.3b, 3b"
    )
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="e2e, swa, full (default all)")
    parser.add_argument("--contexts", nargs="+", type=positive, default=[], metavar="T", help="tokens of context")
    parser.add_argument(
        "--sequences", type=positive, metavar="B", help="of one training step, on each GPU (default by size)"
    )
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="train on so many GPUs of this machine")
    parser.add_argument(
        "--update", choices=("shared", "replicated"), default="shared", help="what several GPUs divide (default shared)"
    )
    parser.add_argument(
        "--state-parallel", type=positive, default=1, metavar="P", help="of several GPUs, those that share sequences"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="measurements of each (default 5)")
    parser.add_argument("--profile", action="store_true", help="also tell where the time goes")
    parser.add_argument("--from", dest="source", metavar="FILE", help="measure nothing; take the rows of a --json FILE")
    parser.add_argument("--json", metavar="FILE", help="add the figures to this file as they come")
    parser.add_argument("--report", metavar="FILE", help="write the page here as well (Markdown)")
    parser.add_argument("--plots", metavar="DIR", help="write SVG plots here")
    add_force(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status: 1 if a result was wrong."""
    from longread import record
    from longread.bench import Outcome, markdown, merged, read_rows, save_bench_plots
    from longread.cli.outputs import check_outputs, write_text

    check_at_most("--repeats", options.repeats, MOST_REPEATS, "measurements")
    check_outputs(options, inputs=[options.source], plots=PLOTS, goes_on_with=[("--json", options.json)])
    before = read_rows(options.json, missing_ok=True) if options.json else []
    outcome = Outcome(rows=read_rows(options.source)) if options.source else _measured(options, before)
    command = shlex.join(["longread", *sys.argv[1:]])
    page = markdown(outcome, command=command, hardware=None if options.source else record.hardware())
    print(page, end="")
    if options.report:
        write_text(options.report, page)
    if options.plots:
        save_bench_plots(merged(before, outcome.rows), Path(options.plots))
    return int(outcome.red)


def _measured(options: argparse.Namespace, before: list[dict[str, object]]) -> Outcome:
    from longread.bench import merged, plan, run_cases, write_rows
    from longread.model import find_device

    device = find_device(options.device)
    cases = plan(
        options.works,
        gpu=device.type == "cuda",
        sizes=options.sizes,
        methods=options.methods,
        contexts=options.contexts,
        sequences=options.sequences,
        gpus=options.gpus,
        update=options.update,
        state=options.state_parallel,
    )
    rows: list[dict[str, object]] = []

    def keep(row: dict[str, object]) -> None:
        rows.append(row)
        if options.json:
            write_rows(options.json, merged(before, rows))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return run_cases(cases, device, repeats=options.repeats, profile=options.profile, say=say, on_row=keep)
