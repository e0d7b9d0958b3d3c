"""Memory of sessions or of training, time and cost of training on several GPUs, before anything is trained or served.

Example:
  longread estimate 3b --precision bfloat16 --memory 139 --context-length 131072
  longread estimate 3b --train 1 --precision bfloat16 --memory 139 --context-length 32768
  longread estimate models/converted --train 1 --only suffix --precision bfloat16 --memory 80 --context-length 8192
  longread estimate 3b --train --gpus 8 --nodes 8 --price 2.50
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import MOST_TOKENS, add_json, add_kept_tokens, positive
from longread.cli.plans import AS_MANY_AS_FIT, EstimateRow, add_plan, check_plan, plan_rows, shown

if TYPE_CHECKING:
    from longread.config import ModelConfig
    from longread.model import Transformer

FORMAT = "longread-estimate/1"
DEFAULT_CONTEXT = 131_072


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a recipe, a model directory, a run, or a checkpoint")
    parser.add_argument(
        "--context-length",
        type=positive,
        help=f"for full attention, or --train (default {DEFAULT_CONTEXT}; with --gpus that of the recipe)",
    )
    parser.add_argument(
        "--train",
        type=positive,
        nargs="?",
        const=AS_MANY_AS_FIT,
        metavar="N",
        help="of training instead, at N sequences a time, each as long as --context-length says; with --gpus "
        "as many as fit, without N",
    )
    parser.add_argument("--only", choices=("suffix",), help="of training the blocks alone that learn while reading")
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the model's numbers; auto (default): as on this machine, bfloat16 on a GPU and float32 on a CPU",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of the device: say how many sessions fit, or which training"
    )
    add_kept_tokens(parser)
    add_plan(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.outputs import check_outputs, tables_console, write_text
    from longread.config import UserError

    check_outputs(options)
    if options.kept_tokens is not None and options.train is not None:
        raise UserError("--kept-tokens is about reading, and training keeps none; leave one of it and --train out")
    if options.memory is not None and not 0 < options.memory < 2**30:
        raise UserError(f"--memory is {options.memory:g}; give GiB, above 0 and below {2**30}")
    check_plan(options)
    if options.gpus is not None:
        rows, about = plan_rows(options)
    else:
        rows, about = _rows(options)
    screen = tables_console(options)
    for row in rows:
        screen.out(row.line, highlight=False)
    if options.json:
        found = {"format": FORMAT, **about}
        found["rows"] = [{"what": row.what.strip(), row.unit: row.value} for row in rows]
        write_text(options.json, json.dumps(found, indent=2) + "\n")
    return 0


def _rows(options: argparse.Namespace) -> tuple[list[EstimateRow], dict[str, object]]:
    """The figures of one device, and what they are about."""
    from longread.config import UserError

    config, precision = _config(options.model), _precision(options.precision)
    context = options.context_length or DEFAULT_CONTEXT
    if options.kept_tokens is not None:
        config = dataclasses.replace(config, kept_tokens=options.kept_tokens)
    if options.train == AS_MANY_AS_FIT:
        raise UserError("--train has no number; say how many sequences at a time, or give --gpus for a plan")
    if options.train is not None:
        rows = _training(config, precision, context, options)
    elif options.only:
        raise UserError("--only is about training; give --train too")
    else:
        rows = _sessions(config, precision, context, options.memory)
    return rows, {"precision": precision, "context_length": context}


def _sessions(config: ModelConfig, precision: str, context: int, memory: float | None) -> list[EstimateRow]:
    """The memory of a session at rest and while it writes and, of a device's memory, how many of them fit."""
    from longread.engine import capacity, session_sizes
    from longread.engine.memory import MOST_TOGETHER, SHARE
    from longread.inner_loop.kept import kept_nbytes

    model = _on_no_device(config, precision)
    item = model.dtype.itemsize
    weights = config.num_parameters * item
    full = any(config.window_of(i) is None for i in range(config.num_blocks))
    session = session_sizes(model, context)
    dense_config = dataclasses.replace(config, attention="full", mixer="attention", num_suffix_blocks=0, kept_tokens=0)
    dense = session_sizes(_on_no_device(dense_config, precision), context)
    rows = [
        (f"parameters, {config.num_parameters / 1e6:,.1f} million in {precision}", weights),
        ("one session" + (f" at {context:,} tokens" if full else ", at any length"), session.resting),
    ]
    if config.num_fast_weights:
        rows.append(("  of that fast weights, in float32", config.num_fast_weights * 4))
    if config.kept_tokens:
        rows.append((f"  of that {config.kept_tokens:,} tokens kept beyond the window", kept_nbytes(model)))
    elif config.num_fast_weights:
        rows.append(("more in the place where it writes", session.writing - session.resting))
    beside_dense = dense.resting > session.resting and config != dense_config
    if beside_dense:
        rows.append((f"keys and values of full attention at {context:,} tokens", _dense_bytes(config, context, item)))
    found_rows = [EstimateRow(what, size, "bytes") for what, size in rows]
    if memory is None:
        return found_rows
    free = int(memory * 2**30) - weights
    found = capacity(free, session)
    found_rows += [
        EstimateRow(f"for sessions, {100 * SHARE:.0f} % of what is left of {memory:g} GiB", found.budget, "bytes"),
        EstimateRow("sessions that lie there, none of which writes", found.resting, "count"),
    ]
    writing = [("sessions", found.writing)] + [
        ("texts of full attention", capacity(free, dense).writing)
    ] * beside_dense
    for what, count in writing:
        most = ", the most that may (--max-batch)" if count == MOST_TOGETHER else ""
        found_rows.append(EstimateRow(f"{what} that write at once{most}", count, "count"))
    if not found.writing:
        remark = _too_small(free, weights, found.budget, session.resting + session.place)
        found_rows.append(EstimateRow("", remark, "remark"))
    return found_rows


def _dense_bytes(config: ModelConfig, context: int, itemsize: int) -> int:
    windows = config.block_windows or (0,) * config.num_blocks
    tokens = sum(min(context, window or context) for window in windows)
    return 2 * tokens * config.kv_width * itemsize


def _training(config: ModelConfig, precision: str, context: int, options: argparse.Namespace) -> list[EstimateRow]:
    """The memory of a training step with each schedule that has a name, and with the first of all that fits."""
    from longread.config import SCHEDULES, UserError
    from longread.outer_loop import UPDATE_BYTES, activation_budget, graph_bytes, num_trained

    sequences, memory = options.train, options.memory
    blocks = config.num_suffix_blocks if options.only else None
    if blocks == 0:
        raise UserError(f"--only suffix: {options.model} has no blocks that learn; leave it out")
    if sequences > 1 and sequences * context > MOST_TOKENS:
        raise UserError(
            f"--train {sequences} is {sequences:,} sequences of {context:,} tokens at a time, more than "
            f"{MOST_TOKENS:,} tokens; give fewer or shorter ones, or --train 1 --context-length {sequences} if that is "
            "how long one is to be"
        )
    if context % config.mini_batch_size:
        raise UserError(f"--context-length is {context}; give a multiple of the mini-batch, {config.mini_batch_size}")
    parameters = 4 * config.num_parameters
    weights = parameters + UPDATE_BYTES * num_trained(config, blocks)
    learns = config.num_suffix_blocks > 0
    need = graph_bytes(
        config,
        "end-to-end" if learns else "static",
        batch_size=sequences,
        context_length=context,
        itemsize=2 if precision == "bfloat16" else 4,
        kernels=precision == "bfloat16",
        trained_blocks=blocks,
    )
    updated = f"and gradients and AdamW of {blocks} blocks" if blocks else "gradients and AdamW"
    rows = [EstimateRow(f"parameters, {updated}, in float32", weights, "bytes")]
    budget = -1.0 if memory is None else activation_budget(memory * 2**30 - parameters, config, blocks)
    first = next((schedule for schedule, size in need.items() if size <= budget), None)
    for schedule, size in need.items():
        if schedule in (first, *SCHEDULES[: None if learns else 2]):
            step = f"a step of {sequences} × {context:,} tokens in {precision}, recompute {schedule}"
            rows.append(EstimateRow(step, weights + size, "bytes"))
    if memory is not None:
        rows.append(EstimateRow(f"the first that fits into {memory:g} GiB, a fifth left free", first, "schedule"))
    return rows


def _too_small(free: int, weights: int, budget: int, session: int) -> str:
    """Why not even one session can write."""
    if free <= 0:
        return f"The parameters alone take {shown(weights)}; give more --memory."
    return (
        f"The parameters leave {shown(free)}, sessions may take {shown(budget)} of that, and one that enters the "
        f"place where it writes takes {shown(session)}; give more --memory."
    )


def _config(name: str) -> ModelConfig:
    from longread.checkpoint import describe_model
    from longread.config import UserError
    from longread.loading import boxed_models, find_model
    from longread.recipes import RECIPES, recipe

    if Path(name).exists() or name in boxed_models():
        return describe_model(find_model(name)).config
    if name not in RECIPES:
        raise UserError(f"there is no model at {name}; give a directory, or one of the recipes {', '.join(RECIPES)}")
    return recipe(name).model


def _precision(asked: str) -> str:
    """The precision of models on this machine, where nothing else is asked for."""
    from longread.model import find_device

    if asked != "auto":
        return asked
    return "bfloat16" if find_device("auto").type == "cuda" else "float32"


def _on_no_device(config: ModelConfig, precision: str) -> Transformer:
    """The model without its numbers."""
    import torch

    from longread.model import undrawn

    return undrawn(config).to(getattr(torch, precision))
