"""The rows that `longread estimate` shows, and those of a plan of training on several GPUs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from longread.cli.arguments import positive
from longread.config import Update

if TYPE_CHECKING:
    from longread.config import RunConfig
    from longread.planning import Plan

AS_MANY_AS_FIT = 0
"""The value of --train where no number is given."""
_OF_A_PLAN = ("nodes", "gpu", "batch_size", "update", "state_parallel", "recompute", "price")
_HIGHEST_PRICE = 1e6


Unit = Literal["bytes", "count", "schedule", "remark", "seconds", "percent", "days", "USD"]


class EstimateRow(NamedTuple):
    """One figure: of what, in which unit."""

    what: str
    value: float | str | None
    unit: Unit

    @property
    def line(self) -> str:
        """The row for people."""
        if self.unit == "remark":
            return str(self.value)
        return f"{self.what:60} {_SHOWN[self.unit](self.value):>12}"


def shown(size: int) -> str:
    """A number of bytes."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


_SHOWN: dict[Unit, Callable[[Any], str]] = {
    "bytes": shown,
    "count": "{:,}".format,
    "schedule": lambda value: value or "none of them",
    "seconds": lambda value: f"{value:,.3f} s" if value >= 1 else f"{1e3 * value:.3f} ms",
    "percent": "{:.1f} %".format,
    "days": lambda value: f"{value:,.1f} days" if value >= 2 else f"{24 * value:.1f} hours",
    "USD": "{:,.0f} USD".format,
}


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of a plan; what is not given has no value, so that it can be refused without --gpus."""
    parser.add_argument("--gpus", type=positive, metavar="N", help="plan --train on a node of so many")
    parser.add_argument("--nodes", type=positive, metavar="K", help="nodes of the plan (default 1)")
    parser.add_argument("--gpu", metavar="NAME", help="a100, h100, h200 (default) or b200")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="sequences of a step (default: the recipe's)")
    parser.add_argument(
        "--update",
        choices=get_args(Update),
        help="what GPUs of a node divide: AdamW's moments (shared, default), nothing, or parameters and gradients too",
    )
    parser.add_argument(
        "--state-parallel", type=positive, metavar="P", help="GPUs that divide each fast MLP (default 1)"
    )
    parser.add_argument(
        "--recompute",
        metavar="SCHEDULE",
        help="computed again: none, blocks, N-blocks, N-steps, sqrt, step, all (default auto, the first that fits)",
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of a GPU and hour: say what the run costs")


def check_plan(options: argparse.Namespace) -> None:
    """Raises `UserError` for options of a plan where none is asked for, and numbers that make no sense."""
    from longread.config import UserError

    if options.gpus is None:
        for name in _OF_A_PLAN:
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is about a plan; give --train and --gpus too")
        return
    if options.train is None:
        raise UserError("--gpus is about training; give --train too")
    if options.precision == "float32":
        raise UserError("--precision float32 cannot be planned: training steps were measured in bfloat16; leave it out")
    if options.price is not None and not 0 < options.price < _HIGHEST_PRICE:
        raise UserError(f"--price is {options.price:g}; give USD, above 0 and below {_HIGHEST_PRICE:,.0f}")


def plan_rows(options: argparse.Namespace) -> tuple[list[EstimateRow], dict[str, Any]]:
    """The figures of the plan, and what it is a plan of. Raises `UserError` if it does not fit."""
    from longread.config import Parallelism
    from longread.planning import Layout, gpu_named, plan_training

    gpu = gpu_named(options.gpu or "h200")
    if options.memory is not None:
        gpu = dataclasses.replace(gpu, memory=options.memory * 2**30)
    parallelism = Parallelism(update=options.update or "shared", state=options.state_parallel or 1)
    layout = Layout(options.gpus, options.nodes or 1, parallelism)
    plan = plan_training(_run_config(options), layout, gpu)
    about = {
        "precision": "bfloat16",
        "context_length": plan.config.context_length,
        "gpu": gpu.name,
        "gpus": layout.gpus,
        "nodes": layout.nodes,
        "update": parallelism.update,
        "state_parallel": parallelism.state,
        "batch_size": plan.config.batch_size,
        "micro_batch_size": plan.load.micro_batch_size,
        "recompute": plan.load.recompute,
        "steps": plan.config.steps,
    }
    return [*_of_memory(plan), *_of_time(plan, options.price), *_remarks(plan)], about


def _run_config(options: argparse.Namespace) -> RunConfig:
    """The run that is planned: the recipe, or the adaptation of a model, with what the user changed."""
    from longread.checkpoint import describe_model
    from longread.config import UserError
    from longread.loading import boxed_models, find_model
    from longread.recipes import RECIPES, SIZES, adapt, recipe

    name, context = options.model, options.context_length
    dials = {} if context is None else {"context_length": context}
    if Path(name).exists() or name in boxed_models():
        model = describe_model(find_model(name)).config
        config = adapt(model, "e2e" if model.num_suffix_blocks else "swa", **dials)
    elif name not in RECIPES:
        raise UserError(f"there is no model at {name}; give a directory, or one of the recipes {', '.join(RECIPES)}")
    else:
        config = recipe(name, **({} if name in SIZES else dials))
    changes: dict[str, Any] = {"micro_batch_size": options.train or None, "recompute": options.recompute or "auto"}
    if context is not None and context != config.context_length:  # pre-training, at as many tokens a step
        changes |= dials | {"batch_size": max(1, config.batch_size * config.context_length // context)}
    if options.batch_size is not None:
        changes["batch_size"] = options.batch_size
    batch = changes.get("batch_size", config.batch_size)
    if options.train and batch % options.train:
        raise UserError(
            f"--train {options.train} does not divide the {batch} sequences of a step; give a divisor, or another "
            "--batch-size"
        )
    if options.only:
        if not config.model.num_suffix_blocks:
            raise UserError(f"--only suffix: {name} has no blocks that learn; leave it out")
        changes["trained_blocks"] = config.model.num_suffix_blocks
    return dataclasses.replace(config, **changes)


def _of_memory(plan: Plan) -> list[EstimateRow]:
    load, layout, config = plan.load, plan.layout, plan.config
    share, memory = layout.share(config), load.memory
    at_a_time = f", {load.micro_batch_size} at a time" if load.micro_batch_size < share else ""
    rows = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("moments of AdamW", memory.moments),
        ("what is gathered of others' weights, with gradients", memory.gathered),
        ("CUDA, NCCL and buckets", memory.buffers),
        (f"activations, recompute {load.recompute}", memory.activations),
        (f"a GPU in all, of {plan.gpu.memory / 2**30:.1f} GiB", memory.total),
    ]
    steps = f"{config.batch_size} × {config.context_length:,} tokens a step, {share} sequences a GPU{at_a_time}"
    if layout.parallelism.state > 1:
        steps += f", shared by {layout.parallelism.state}"
    nodes = f"{layout.nodes} nodes of " if layout.nodes > 1 else ""
    where = f"{nodes}{layout.gpus} × {plan.gpu.name}, update {layout.parallelism.update}"
    head = [EstimateRow("", f"{config.name} on {where}: {steps}", "remark")]
    return head + [EstimateRow(what, size, "bytes") for what, size in rows if size]


def _of_time(plan: Plan, price: float | None) -> list[EstimateRow]:
    seconds = plan.seconds
    parts = [
        ("computing", seconds.compute),
        ("AdamW", seconds.update),
        ("sums of state parallel", seconds.state_parallel),
        ("travelling within a node", seconds.within),
        ("travelling between nodes", seconds.between),
        ("a step in all", seconds.total),
    ]
    rows = [EstimateRow(what, value, "seconds") for what, value in parts if value]
    rows += [
        EstimateRow("of that computing and AdamW", 100 * seconds.efficiency, "percent"),
        EstimateRow("tokens per second", round(plan.tokens_per_second), "count"),
        EstimateRow("tokens per day", round(plan.tokens_per_day), "count"),
        EstimateRow(f"the run, {plan.config.steps:,} steps", plan.days, "days"),
    ]
    if price is not None:
        hours = f"{plan.layout.all_gpus} GPUs at {price:g} USD an hour"
        rows.append(EstimateRow(f"the run, {hours}", plan.cost(price), "USD"))
    return rows


def _remarks(plan: Plan) -> list[EstimateRow]:
    """The basis of the figures, and how far they can be trusted."""
    from longread.planning.measured import MEASURED_ON

    basis, gpu = plan.basis, plan.gpu
    measured = f"{basis.row.size} {basis.row.method} at {basis.row.context:,} tokens did on one {MEASURED_ON.name}"
    said = [f"Computing at {100 * basis.share:.0f} % of the peak, as {measured}. Rates of links are assumed."]
    if plan.config.meta_gradient == "first-order":
        said.append("All of it is for the exact meta-gradient; a model is adapted first-order, which takes less.")
    if gpu.name != MEASURED_ON.name:
        said.append(f"No {gpu.name} was measured: that share is assumed to be the same there.")
    if basis.is_far:
        said.append("Nothing of about this size was measured: small networks reach less of the peak.")
    if not plan.load.spare:
        said.append("Less than a fifth of the memory is left free; estimates are up to 15 % off, so it may run out.")
    return [EstimateRow("", text, "remark") for text in said]
