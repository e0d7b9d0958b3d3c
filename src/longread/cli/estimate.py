"""Memory of sessions, or of training: what they take, and what fits, before anything is trained or served.

Example:
  longread estimate 3b --precision bfloat16 --memory 139 --context-length 131072
  longread estimate 3b --train 1 --precision bfloat16 --memory 139 --context-length 32768
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import positive

if TYPE_CHECKING:
    from longread.config import ModelConfig
    from longread.model import Transformer

NAME = "estimate"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a recipe, a model directory, a run, or a checkpoint")
    parser.add_argument(
        "--context-length", type=positive, default=131_072, help="for full attention, or --train (default 131072)"
    )
    parser.add_argument(
        "--train", type=positive, metavar="N", help="of training instead, N sequences of the context length at a time"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the model's numbers; auto (default): as on this machine, bfloat16 on a GPU and float32 on a CPU",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of the device: say how many sessions fit, or which training"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.config import UserError

    if options.memory is not None and not 0 < options.memory < 2**30:
        raise UserError(f"--memory is {options.memory:g}; give GiB, above 0 and below {2**30}")
    config, precision = _config(options.model), _precision(options.precision)
    if options.train is not None:
        return _training(config, precision, options.train, options.context_length, options.memory)
    model = _on_no_device(config, precision)
    item = model.dtype.itemsize
    weights = config.num_parameters * item
    full = sum(config.window_of(i) is None for i in range(config.num_blocks))
    growing = 2 * full * options.context_length * config.width * item
    session = session_bytes(model) + growing
    dense = 2 * config.num_blocks * options.context_length * config.width * item
    writing = config.num_fast_weights * item
    rows = [
        (f"parameters, {config.num_parameters / 1e6:,.1f} million in {precision}", weights),
        ("one session" + (f" at {options.context_length:,} tokens" if full else ", at any length"), session),
    ]
    if writing:
        rows.append(("  of that fast weights, in float32", config.num_fast_weights * 4))
        rows.append(("more while it writes: its fast weights once more", writing))
    if growing < dense:
        rows.append((f"keys and values of full attention at {options.context_length:,} tokens", dense))
    for what, size in rows:
        print(f"{what:60} {_shown(size):>12}")
    if options.memory is None:
        return 0
    room = int(options.memory * 2**30) - weights
    fitting = [("sessions", session + writing)] + [("texts of full attention", dense)] * (growing < dense)
    for what, size in fitting:
        print(f"{f'{what} that write at once in {options.memory:g} GiB':60} {max(0, room // size):>12,}")
    if room < session + writing:
        print(_too_small(room, weights, session + writing))
    return 0


def _training(config: ModelConfig, precision: str, sequences: int, context: int, memory: float | None) -> int:
    """Says what a training step takes with each schedule of recomputation, and which of them is the first to fit."""
    from longread.config import UserError
    from longread.outer_loop import UPDATE_BYTES, activation_budget, graph_bytes

    if context % config.mini_batch_size:
        raise UserError(f"--context-length is {context}; give a multiple of the mini-batch, {config.mini_batch_size}")
    parameters = 4 * config.num_parameters
    weights = parameters + UPDATE_BYTES * config.num_parameters
    need = graph_bytes(
        config,
        "end-to-end" if config.num_suffix_blocks else "static",
        batch_size=sequences,
        context_length=context,
        itemsize=2 if precision == "bfloat16" else 4,
        kernels=precision == "bfloat16",
    )
    print(f"{'parameters, gradients and AdamW, in float32':60} {_shown(weights):>12}")
    for schedule, size in need.items():
        step = f"a step of {sequences} × {context:,} tokens in {precision}, recompute {schedule}"
        print(f"{step:60} {_shown(weights + size):>12}")
    if memory is not None:
        budget = activation_budget(memory * 2**30 - parameters, config)
        fitting = [schedule for schedule, size in need.items() if size <= budget]
        what = f"the first that fits into {memory:g} GiB, a fifth left free"
        print(f"{what:60} {fitting[0] if fitting else 'none of them':>12}")
    return 0


def _too_small(room: int, weights: int, session: int) -> str:
    """Why not even one session fits."""
    if room <= 0:
        return f"The parameters alone take {_shown(weights)}; give more --memory."
    return (
        f"The parameters leave {_shown(room)}, and a session that writes takes {_shown(session)}; give more --memory."
    )


def session_bytes(model: Transformer) -> int:
    """Most bytes of one session, keys and values of attention without a window left out."""
    from longread.engine import largest_session

    return largest_session(model)


def _config(name: str) -> ModelConfig:
    from longread.checkpoint import load_model
    from longread.config import UserError
    from longread.loading import boxed_models, find_model
    from longread.recipes import RECIPES, recipe

    if Path(name).exists() or name in boxed_models():
        return load_model(find_model(name)).model.config
    if name not in RECIPES:
        raise UserError(f"there is no model at {name}; give a directory, or one of the recipes {', '.join(RECIPES)}")
    return recipe(name).model


def _precision(asked: str) -> str:
    """What models compute in on this machine, where nothing else is asked for."""
    from longread.model import find_device

    if asked != "auto":
        return asked
    return "bfloat16" if find_device("auto").type == "cuda" else "float32"


def _on_no_device(config: ModelConfig, precision: str) -> Transformer:
    """The model without its numbers."""
    import torch

    from longread.model import Transformer

    with torch.device("meta"):
        return Transformer(config).to(getattr(torch, precision))


def _shown(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
