"""`longread convert` of a checkpoint that the official code saved with Orbax."""

from __future__ import annotations

import argparse
from pathlib import Path

from longread.config import UserError

_NEEDLESS = ("suffix", "fast_hidden", "scheme", "dtype", "to", "drop_fast")
"""Options of other sources."""


def add_orbax_options(parser: argparse.ArgumentParser) -> None:
    """Declares what is asked of such a checkpoint, beside --window, --mini-batch and --tokenizer."""
    parser.add_argument_group("of an official checkpoint").add_argument(
        "--size", metavar="SIZE", help="125m, 1b, 3b or another of Table 3; window and mini-batch default to its"
    )


def find_orbax(options: argparse.Namespace) -> Path | None:
    """The weights of the official checkpoint that SOURCE names; None if it names none.

    Raises `UserError` for options that belong to another kind of source.
    """
    from longread.checkpoint import ORBAX_ITEM, find_orbax_item

    if options.source.startswith("gs://"):
        raise UserError(f"{options.source} is not on this machine; copy it, for example with gcloud storage cp -r")
    item = find_orbax_item(options.source, ORBAX_ITEM)
    if item is None and options.size:
        raise UserError(
            f"--size {options.size} is about an Orbax checkpoint of the official code, and {options.source} is none; "
            "leave it out"
        )
    given = [f"--{name.replace('_', '-')}" for name in _NEEDLESS if getattr(options, name) not in (None, False)]
    if item is not None and given:
        raise UserError(f"{options.source} is an Orbax checkpoint of the official code; leave out {given[0]}")
    return item


def from_orbax(item: Path, destination: Path, options: argparse.Namespace) -> str:
    """Writes the model into `destination`, which exists, and says what it is."""
    from longread.checkpoint import OrbaxModel, save_streamed
    from longread.config import InnerConfig
    from longread.tokenizer import copy_tokenizer, load_tokenizer

    model = OrbaxModel(item, options.size, window=options.window, mini_batch=options.mini_batch)
    config, table = model.config, model.table_config
    path = _tokenizer(item, options)
    tokenizer = load_tokenizer(path) if path else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens and the model knows {config.vocab_size}; give its own tokenizer"
        )
    provenance: dict[str, str | int] = {"converted_from": Path(options.source).name, "size": options.size}
    if item.parent.name.isdecimal():
        provenance["step"] = int(item.parent.name)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    save_streamed(destination, config, model.layout, model, InnerConfig(), fingerprint, provenance)
    if path:
        copy_tokenizer(path, destination)
    of_table = "" if config.mlp_hidden == table.mlp_hidden else f" (Table 3: {table.mlp_hidden:,})"
    return (
        f"a Longread model of {config.num_parameters:,} parameters in {str(model.dtype).removeprefix('torch.')}, "
        f"{'with its tokenizer' if path else 'without a tokenizer: name one with --tokenizer'}; the last "
        f"{config.num_suffix_blocks} of {config.num_blocks} blocks learn every {config.mini_batch_size:,} tokens, "
        f"window {config.window_size:,}, MLPs {config.mlp_hidden:,} wide{of_table}"
    )


def _tokenizer(item: Path, options: argparse.Namespace) -> Path | None:
    """The one that was named, or that lies beside the weights."""
    if options.tokenizer:
        named = Path(options.tokenizer)
        return named / "tokenizer.json" if named.is_dir() else named
    beside = [folder / "tokenizer.json" for folder in (Path(options.source), item, item.parent)]
    return next((path for path in beside if path.is_file()), None)
