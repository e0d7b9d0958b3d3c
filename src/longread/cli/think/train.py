"""Train a world model and an agent that thinks in it; two minutes on two cores.

SIGINT, SIGTERM and SIGHUP leave a checkpoint, from which --resume goes on.

Example:
  longread think train --out runs/thinker
  longread think train --out runs/gap --withheld acd --selection gap --seed 1
  longread think train --out runs/long --iterations 2500 --set swapped_share=0.25
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longread.cli.arguments import add_device, add_json, changed, positive

if TYPE_CHECKING:
    from longread.thinking import ThinkingConfig, ThinkingTrainResult

FORMAT = "longread-thinking-training/1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the action."""
    parser.add_argument("--out", required=True, metavar="RUN", help="a new directory")
    parser.add_argument("--withheld", metavar="LETTERS", help="families never together in training (default abc)")
    parser.add_argument("--iterations", type=positive, metavar="N", help="of the agent (default 1500)")
    parser.add_argument("--trials", type=positive, metavar="K", help="mental trials before acting (default 8)")
    parser.add_argument(
        "--selection", metavar="RULE", help="of boards: random, gap, learnability, gap_unsolved, sequence_gap"
    )
    parser.add_argument("--seed", type=int, help="of weights, boards and luck (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in RUN")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one field of the config; repeatable"
    )
    add_device(parser)
    add_json(parser, "the last row of the metrics")


def run(options: argparse.Namespace) -> int:
    """Runs the action and returns its exit status; of a run that a signal has stopped, 128 and its number."""
    from longread.cli.outputs import check_outputs, progress_console, tables_console, write_text
    from longread.cli.think.progress import ThinkingProgress
    from longread.config import UserError
    from longread.model import find_device
    from longread.thinking import ThinkingConfig, train
    from longread.train.stopping import StopSignal

    if not options.out:
        raise UserError("--out is empty; name a directory")
    check_outputs(options)
    dials = {name: getattr(options, name) for name in ("withheld", "iterations", "trials", "selection", "seed")}
    settings = [f"{name}={value}" for name, value in dials.items() if value is not None]
    config = changed(ThinkingConfig(), [*settings, *options.set])
    device = find_device(options.device)
    with StopSignal() as stop, ThinkingProgress(config, progress_console(options)) as progress:
        result = train(
            config,
            options.out,
            device=device,
            resume=options.resume,
            stopped=lambda: stop.requested,
            on_step=progress,
        )
    with contextlib.suppress(BrokenPipeError):  # the status says how it ended
        tables_console(options).out(_ending(config, options.out, result), highlight=False)
    if options.json:
        row: Mapping[str, Any] = result.row or {"step": result.step}
        write_text(options.json, json.dumps({"format": FORMAT, **row}, indent=2) + "\n")
    return 128 + (stop.number or 0) if result.thinker is None else 0


def _ending(config: ThinkingConfig, out: str, result: ThinkingTrainResult) -> str:
    steps = config.world_model.steps + config.iterations
    if result.thinker is None:
        return f"stopped after step {result.step} of {steps}; --resume goes on from there"
    return (
        f"{out}: {result.step} steps, {result.thinker.num_parameters:,} parameters; `longread think evaluate` is next"
    )
