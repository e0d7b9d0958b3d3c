"""Train a model.

Example:
  longread train toy --data data --out runs/toy
  longread train toy --steps 40 --lr 1e-3 --batch-size 4 --data data --out runs/short
  longread train 125m-extend --method swa --context-length 32768 --init runs/125m --data books --out runs/125m-32k
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import TYPE_CHECKING, get_args

from longread.cli.arguments import add_device, add_json, changed, positive
from longread.recipes import RECIPES, Method

if TYPE_CHECKING:
    from longread.config import RunConfig
    from longread.train import TrainResult

NAME = "train"
FORMAT = "longread-training/1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--data", required=True, metavar="DIR", help="what `longread prepare` wrote")
    parser.add_argument("--out", required=True, metavar="RUN", help="a new directory")
    parser.add_argument("--method", default="e2e", help=", ".join(get_args(Method)) + " (default e2e)")
    parser.add_argument(
        "--context-length", type=positive, metavar="T", help="tokens of a training sequence (default: the recipe's)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="how many; the recipe's schedules scale with them")
    parser.add_argument("--lr", type=float, metavar="RATE", help="the highest outer rate (default: the recipe's)")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="sequences of a step (default: the recipe's)")
    parser.add_argument("--validation", metavar="DIR", help="held-out data; by default the data set's own")
    parser.add_argument("--init", metavar="MODEL", help="begin with these weights")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one field of the recipe; repeatable"
    )
    parser.add_argument("--tracker", action="append", default=[], help="tensorboard, wandb or trackio; repeatable")
    add_device(parser)
    add_json(parser, "the last row of the metrics")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status; of a run that a signal has stopped, 128 and its number."""
    from longread.cli.outputs import (
        Output,
        check_outputs,
        figures_of,
        progress_console,
        tables_console,
        write_text,
    )
    from longread.config import UserError
    from longread.data import TokenDataset
    from longread.loading import find_model
    from longread.recipes import recipe
    from longread.train import Progress, train

    recipe(options.recipe, options.method)  # a wrong name is said before data are looked for
    if not options.out:
        raise UserError("--out is empty; name a directory")
    check_outputs([Output("--json", options.json, figures_of(FORMAT))])
    data = TokenDataset.open(options.data)
    config = _config(options, data.vocab_size)
    _warn(options, config)
    validation = TokenDataset.open(options.validation) if options.validation else data.validation
    with Progress(config, progress_console(options)) as progress:
        result = train(
            config,
            data,
            options.out,
            validation=validation,
            initial=str(find_model(options.init)) if options.init else None,
            device=options.device,
            resume=options.resume,
            trackers=options.tracker,
            on_step=progress,
        )
    tables_console(options).out(_ending(config, result), highlight=False)
    if options.json:
        row = result.row or {"step": result.step, "tokens": result.tokens}
        write_text(options.json, json.dumps({"format": FORMAT, **row}, indent=2) + "\n")
    return 128 + (result.signal or 0) if result.interrupted else 0


def _config(options: argparse.Namespace, vocab_size: int) -> RunConfig:
    """The recipe with what the user changed. Of a run that goes on, steps and schedules are as when it began."""
    from longread.recipes import recipe, with_steps
    from longread.train import begun_config, with_schedules_of

    config = recipe(
        options.recipe,
        options.method,
        context_length=options.context_length,
        vocab_size=vocab_size,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
    )
    settings = [f"steps={options.steps}"] if options.steps else []
    settings += options.set
    steps = changed(config, [setting for setting in settings if setting.partition("=")[0] == "steps"]).steps
    begun = begun_config(options.out) if options.resume else None
    config = with_steps(config, steps) if begun is None else with_schedules_of(config, begun)
    return changed(config, settings)


def _warn(options: argparse.Namespace, config: RunConfig) -> None:
    """Of what can be meant, and rarely is."""
    if options.recipe.endswith("-extend") and not (options.init or options.resume):
        warnings.warn(
            f"{options.recipe} goes on with a trained model: without --init it begins with none", stacklevel=2
        )
    if options.resume:
        return
    if config.steps != config.optimizer.decay_steps:
        warnings.warn(
            f"there are {config.steps} steps, and the rate decays over {config.optimizer.decay_steps}; "
            "--set optimizer.decay_steps too",
            stacklevel=2,
        )
    for name, warmup in (("optimizer", config.optimizer.warmup_steps), ("inner", config.inner.warmup_steps)):
        if 2 * warmup > config.steps:
            warnings.warn(
                f"{warmup} of {config.steps} steps warm up; lower {name}.warmup_steps, or train longer", stacklevel=2
            )


def _ending(config: RunConfig, result: TrainResult) -> str:
    if not result.interrupted:
        return f"{result.model_directory}: {result.step} steps, {result.tokens:,} tokens"
    if result.saved_step == result.step:
        return f"stopped after step {result.step} of {config.steps}; --resume goes on from there"
    return (
        f"stopped after step {result.step} of {config.steps} while training diverges; --resume goes on from step "
        f"{result.saved_step}"
    )
