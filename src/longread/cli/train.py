"""Train a model, or a model that exists further.

RECIPE may be a model: one that `longread convert` made of a pretrained network, or one trained here. Sizes, tokenizer
and weights are then its own, the schedule is 200 steps of 8 sequences of 8192 tokens, at most at 3e-4, and the
meta-gradient is first-order (--set meta_gradient=exact for the other). With --method swa or full its twin without fast
MLPs is trained instead, to compare with.

Example:
  longread train toy --data data --out runs/toy
  longread train toy --steps 40 --lr 1e-3 --batch-size 4 --data data --out runs/short
  longread train 125m-extend --method swa --context-length 32768 --init runs/125m --data books --out runs/125m-32k
  longread train models/converted --tokens 13000000 --data data --out runs/adapted
  longread train models/converted --method swa --tokens 13000000 --data data --out runs/swa
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import warnings
from typing import TYPE_CHECKING, get_args

from longread.cli.arguments import add_device, add_json, changed, positive
from longread.config import Update
from longread.recipes import RECIPES, Method

if TYPE_CHECKING:
    from longread.checkpoint import ModelDescription
    from longread.config import RunConfig
    from longread.train import TrainResult

FORMAT = "longread-training/1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(RECIPES)}, or a model to go on with")
    parser.add_argument("--data", required=True, metavar="DIR", help="what `longread prepare` wrote")
    parser.add_argument("--out", required=True, metavar="RUN", help="a new directory")
    parser.add_argument("--method", default="e2e", help=", ".join(get_args(Method)) + " (default e2e)")
    parser.add_argument(
        "--context-length", type=positive, metavar="T", help="tokens of a training sequence (default: the recipe's)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="how many; the recipe's schedules scale with them")
    length.add_argument("--tokens", type=positive, metavar="N", help="the same, said in tokens of all steps together")
    parser.add_argument("--lr", type=float, metavar="RATE", help="the highest outer rate (default: the recipe's)")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="sequences of a step (default: the recipe's)")
    parser.add_argument("--window", type=positive, metavar="K", help="tokens that windowed attention sees")
    parser.add_argument("--mini-batch", type=positive, metavar="M", help="tokens between two steps of the inner loop")
    parser.add_argument(
        "--only", choices=("suffix",), help="train the blocks that learn while reading and the final norm, nothing else"
    )
    parser.add_argument("--validation", metavar="DIR", help="held-out data; by default the data set's own")
    parser.add_argument("--init", metavar="MODEL", help="begin with these weights")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one field of the recipe; repeatable"
    )
    parser.add_argument(
        "--update",
        default="shared",
        choices=get_args(Update),
        help="under torchrun, what ranks divide: moments and sums of gradients (shared), nothing, or weights too",
    )
    parser.add_argument(
        "--state-parallel", type=positive, default=1, metavar="P", help="ranks that divide the fast MLPs of a sequence"
    )
    parser.add_argument(
        "--deadline", type=positive, default=600, metavar="SECONDS", help="that a rank waits for others (default 600)"
    )
    parser.add_argument(
        "--profile-steps", metavar="FIRST:LAST", help="steps of which a trace and a table are left in RUN/profile"
    )
    parser.add_argument("--tracker", action="append", default=[], help="tensorboard, wandb or trackio; repeatable")
    add_device(parser)
    add_json(parser, "the last row of the metrics")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status; of a run that a signal has stopped, 128 and its number."""
    from longread.cli.outputs import check_outputs, progress_console, tables_console, write_text
    from longread.config import Parallelism, UserError
    from longread.data import TokenDataset
    from longread.loading import find_model
    from longread.parallel import Launch
    from longread.train import ProfiledSteps, TrainingProgress, train

    model = _model(options)
    _beginning(options, model)  # a wrong name is said before data are looked for
    profiled = None if options.profile_steps is None else ProfiledSteps.parse(options.profile_steps)
    if not options.out:
        raise UserError("--out is empty; name a directory")
    check_outputs(options)
    data = TokenDataset.open(options.data)
    config = _config(options, model, data.vocab_size)
    _warn(options, config)
    initial = model.path if model else find_model(options.init) if options.init else None
    validation = TokenDataset.open(options.validation) if options.validation else data.validation
    rank = Launch.from_environment().rank
    options.quiet = options.quiet or rank > 0  # rank 0 speaks for all
    with TrainingProgress(config, progress_console(options)) as progress:
        result = train(
            config,
            data,
            options.out,
            validation=validation,
            initial=initial,
            device=options.device,
            resume=options.resume,
            trackers=options.tracker,
            on_step=progress,
            parallelism=Parallelism(update=options.update, state=options.state_parallel),
            deadline=options.deadline,
            profiled=profiled,
        )
    if rank:
        return 128 + (result.signal or 0) if result.interrupted else 0
    with contextlib.suppress(BrokenPipeError):  # the status says how it ended
        tables_console(options).out(_ending(config, result), highlight=False)
    if options.json:
        row = result.row or {"step": result.step, "tokens": result.tokens}
        write_text(options.json, json.dumps({"format": FORMAT, **row}, indent=2) + "\n")
    return 128 + (result.signal or 0) if result.interrupted else 0


def _model(options: argparse.Namespace) -> ModelDescription | None:
    """The model that RECIPE names; None if it names a recipe, or nothing."""
    from longread.checkpoint import describe_model
    from longread.config import UserError
    from longread.loading import boxed_models, find_model

    is_path = os.path.exists(options.recipe) or os.sep in options.recipe
    if options.recipe in RECIPES or not (is_path or options.recipe in boxed_models()):
        return None
    if options.init:
        raise UserError(f"{options.recipe} is a model to begin with, and so is --init {options.init}; leave one out")
    return describe_model(find_model(options.recipe))


def _beginning(options: argparse.Namespace, model: ModelDescription | None, vocab_size: int | None = None) -> RunConfig:
    """The recipe with the dials that it takes."""
    from longread.recipes import adapt, recipe

    dials = {"context_length": options.context_length, "batch_size": options.batch_size, "lr": options.lr}
    dials = {name: value for name, value in dials.items() if value is not None}
    if model is None:
        return recipe(options.recipe, options.method, vocab_size=vocab_size, seed=options.seed, **dials)
    inner = model.inner if model.learns else dataclasses.replace(model.inner, lr=1.0)
    reading = {"window_size": options.window, "mini_batch_size": options.mini_batch}
    network = dataclasses.replace(model.config, **{name: n for name, n in reading.items() if n is not None})
    return adapt(network, options.method, inner=inner, seed=options.seed, **dials)


def _config(options: argparse.Namespace, model: ModelDescription | None, vocab_size: int) -> RunConfig:
    """The recipe with what the user changed. Of a run that goes on, steps and schedules are as when it began."""
    from longread.config import UserError
    from longread.recipes import with_steps
    from longread.train import begun_config, with_schedules_of

    config = _beginning(options, model, vocab_size)
    dials = {"model.window_size": options.window, "model.mini_batch_size": options.mini_batch, "steps": options.steps}
    if options.only:
        dials["trained_blocks"] = (model.config if model else config.model).num_suffix_blocks or None
        if dials["trained_blocks"] is None:
            raise UserError(
                f"--only suffix: {options.recipe} has no blocks that learn; --set trained_blocks=N says how many"
            )
    settings = [f"{name}={value}" for name, value in dials.items() if value is not None] + options.set
    if options.tokens:
        sizes = [each for each in settings if each.partition("=")[0] in ("batch_size", "context_length")]
        sized = changed(config, sizes)
        steps = max(1, round(options.tokens / (sized.batch_size * sized.context_length)))
        settings.insert(0, f"steps={steps}")
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
