"""Train a model.

Example:
  longread train toy --data data --out runs/toy
  longread train 125m-extend --method swa --context-length 32768 --init runs/125m --data books --out runs/125m-32k
"""

from __future__ import annotations

import argparse
import warnings
from typing import get_args

from longread.cli.arguments import add_device, changed, positive
from longread.recipes import RECIPES, Method

NAME = "train"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--data", required=True, metavar="DIR", help="what `longread prepare` wrote")
    parser.add_argument("--out", required=True, metavar="RUN", help="a new directory")
    parser.add_argument("--method", default="e2e", help=", ".join(get_args(Method)) + " (default e2e)")
    parser.add_argument(
        "--context-length", type=positive, metavar="T", help="tokens of a training sequence (default: the recipe's)"
    )
    parser.add_argument("--validation", metavar="DIR", help="held-out data; by default the data set's own")
    parser.add_argument("--init", metavar="MODEL", help="begin with these weights")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one field of the recipe; repeatable"
    )
    parser.add_argument("--tracker", action="append", default=[], help="tensorboard, wandb or trackio; repeatable")
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status; of a run that a signal has stopped, 128 and its number."""
    from longread.config import UserError
    from longread.data import TokenDataset
    from longread.loading import find_model
    from longread.recipes import recipe
    from longread.train import Progress, train

    recipe(options.recipe, options.method)  # a wrong name is said before data are looked for
    data = TokenDataset.open(options.data)
    config = recipe(
        options.recipe,
        options.method,
        context_length=options.context_length,
        vocab_size=data.vocab_size,
        seed=options.seed,
    )
    config = changed(config, options.set)
    if options.recipe.endswith("-extend") and not (options.init or options.resume):
        warnings.warn(
            f"{options.recipe} goes on with a trained model: without --init it begins with none", stacklevel=1
        )
    if not options.out:
        raise UserError("--out is empty; name a directory")
    if config.steps != config.optimizer.decay_steps and not options.resume:
        warnings.warn(
            f"there are {config.steps} steps, and the rate decays over {config.optimizer.decay_steps}; "
            "--set optimizer.decay_steps too",
            stacklevel=1,
        )
    validation = TokenDataset.open(options.validation) if options.validation else data.validation
    with Progress(config) as progress:
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
    if result.interrupted:
        print(f"stopped after step {result.step} of {config.steps}; --resume goes on from there")
        return 128 + (result.signal or 0)
    print(f"{result.model_directory}: {result.step} steps, {result.tokens:,} tokens")
    return 0
