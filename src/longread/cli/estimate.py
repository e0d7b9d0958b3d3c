"""Memory of sessions: what one takes, and how many fit, before anything is trained or served.

Example:
  longread estimate 3b --memory 141 --context-length 131072
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
    parser.add_argument("--context-length", type=positive, default=131_072, help="for full attention (default 131072)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of the device: say how many sessions fit")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.config import UserError

    if options.memory is not None and not 0 < options.memory < 2**30:
        raise UserError(f"--memory is {options.memory}; it must be positive, in GiB")
    config = _config(options.model)
    model = _on_no_device(config, options.precision)
    item = model.dtype.itemsize
    weights = config.num_parameters * item
    full = [i for i in range(config.num_blocks) if config.window_of(i) is None]
    growing = 2 * len(full) * options.context_length * config.width * item
    session = session_bytes(model) + growing
    dense = 2 * config.num_blocks * options.context_length * config.width * item
    writing = config.num_fast_weights * item
    rows = [
        (f"parameters, {config.num_parameters / 1e6:,.1f} million in {options.precision}", weights),
        ("one session" + (f" at {options.context_length:,} tokens" if full else ", at any length"), session),
        ("  of that fast weights, in float32", config.num_fast_weights * 4),
        ("more while it writes: its fast weights once more", writing),
        (f"keys and values of full attention at {options.context_length:,} tokens", dense),
    ]
    for what, size in rows:
        print(f"{what:60} {_shown(size):>12}")
    if options.memory is not None:
        room = int(options.memory * 2**30) - weights
        for what, size in (("sessions", session + writing), ("texts of full attention", dense)):
            print(f"{f'{what} that write at once in {options.memory:g} GiB':60} {max(0, room // size):>12,}")
    return 0


def session_bytes(model: Transformer) -> int:
    """Most bytes of one session, keys and values of attention without a window left out."""
    from longread.engine import largest_session

    return largest_session(model)


def _config(name: str) -> ModelConfig:
    from longread.checkpoint import load_model
    from longread.recipes import RECIPES, recipe

    if name in RECIPES and not Path(name).exists():
        return recipe(name).model
    return load_model(name).model.config


def _on_no_device(config: ModelConfig, precision: str) -> Transformer:
    """The model without its numbers."""
    import torch

    from longread.model import Transformer

    with torch.device("meta"):
        return Transformer(config).to(getattr(torch, precision))


def _shown(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
