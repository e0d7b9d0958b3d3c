"""Convert a pretrained model into a reader, a reader back, or to and from the layout of the official implementation.

Example:
  longread convert HuggingFaceTB/SmolLM2-135M runs/smollm  (a model in the cache of the Hugging Face Hub)
  longread convert SmolLM2-135M.gguf runs/smollm --suffix 8
  longread convert runs/smollm plain --to transformers     (the plain windowed model)
  longread convert 125m_ttt_e2e_pretrain_dclm_8k_1x_cc runs/125m --size 125m     (an official checkpoint)
  longread convert tests/parity/09-e2e-long converted      (official numbers to Longread)
  longread convert runs/toy official                       (Longread to official)

A pretrained model is a directory as Transformers saves it, a GGUF file, which is dequantised, or a name of the Hub
whose files are in its cache: llama, mistral, smollm3, qwen2, qwen3, gemma2, gemma3. Nothing is downloaded. Until
`longread train` has adapted it, it reads frozen.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import positive
from longread.config import UserError

if TYPE_CHECKING:
    from longread.pretrained.finding import PretrainedPlace

OFFICIAL_WEIGHTS = "weights.safetensors"
_DIALS = ("window", "mini_batch", "suffix", "fast_hidden", "scheme", "dtype", "tokenizer")
_NOT_OF_ORBAX = ("suffix", "fast_hidden", "scheme", "dtype", "to", "drop_fast")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a pretrained model, a reader, or a folder with weights.safetensors"
    )
    parser.add_argument("destination", metavar="DIR", help="a new directory")
    parser.add_argument("--to", choices=["transformers"], help="make a reader a plain model for Transformers")
    parser.add_argument(
        "--drop-fast", action="store_true", help="leave out fast MLPs that the plain model has no place for"
    )
    dials = parser.add_argument_group("of a pretrained model")
    dials.add_argument(
        "--window", type=positive, metavar="K", help="tokens that attention sees (default 1024, or all of its context)"
    )
    dials.add_argument(
        "--mini-batch", type=positive, metavar="M", help="tokens from which one step is learned (default 256)"
    )
    dials.add_argument("--suffix", type=int, metavar="S", help="blocks that learn (default: the last quarter)")
    dials.add_argument(
        "--fast-hidden",
        type=positive,
        metavar="F",
        help="units of a fast MLP (default: those of the block's MLP)",
    )
    dials.add_argument(
        "--scheme",
        choices=["zero-copy", "in-place"],
        help="learn in a copy that adds nothing at first (default), or in the pretrained MLP itself",
    )
    dials.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the matrices (default: as they are stored; float32 if quantised)",
    )
    dials.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json to take instead of the source's tokenizer")
    parser.add_argument_group("of an official checkpoint").add_argument(
        "--size", metavar="SIZE", help="125m, 1b, 3b or another of Table 3; window and mini-batch default to its"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.files import remove_tree, temporary_sibling, writing
    from longread.loading import boxed_models, find_model
    from longread.pretrained import find_pretrained

    destination = Path(options.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} already exists; give the name of a new directory")
    orbax = _find_orbax(options)
    pretrained = None if orbax or options.source in boxed_models() else find_pretrained(options.source)
    source = orbax or (find_model(options.source) if pretrained is None else pretrained.path)
    if orbax is None:
        _check_options(options, pretrained=pretrained is not None)
    aside = temporary_sibling(destination)
    try:
        with writing(destination):
            aside.mkdir(parents=True)
            if orbax:
                what = _from_orbax(orbax, aside, options)
            elif pretrained:
                what = _from_pretrained(pretrained, aside, options)
            elif options.to:
                what = _to_transformers(source, aside, options)
            elif (source / OFFICIAL_WEIGHTS).is_file():
                what = _from_official(source, aside)
            else:
                what = _to_official(source, aside)
            os.replace(aside, destination)
    finally:
        remove_tree(aside)
    print(f"{destination}: {what}")
    return 0


def _check_options(options: argparse.Namespace, *, pretrained: bool) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _DIALS if getattr(options, name) is not None]
    if pretrained and options.to:
        raise UserError(f"{options.source} is a Transformers model or a GGUF already; leave out --to {options.to}")
    if not pretrained and given:
        raise UserError(f"{given[0]} is about a pretrained model, and {options.source} is none; leave it out")
    if options.drop_fast and not options.to:
        raise UserError("--drop-fast belongs to --to transformers; leave it out")


def _find_orbax(options: argparse.Namespace) -> Path | None:
    """The weights of the official checkpoint that SOURCE names; None if it names none.

    Raises `UserError` for options that belong to another kind of source.
    """
    from longread.checkpoint import find_orbax_item
    from longread.checkpoint.official_orbax import ITEM

    if options.source.startswith("gs://"):
        raise UserError(f"{options.source} is not on this machine; copy it, for example with gcloud storage cp -r")
    item = find_orbax_item(options.source, ITEM)
    if item is None and options.size:
        raise UserError(
            f"--size {options.size} is about an Orbax checkpoint of the official code, and {options.source} is none; "
            "leave it out"
        )
    given = [f"--{name.replace('_', '-')}" for name in _NOT_OF_ORBAX if getattr(options, name) not in (None, False)]
    if item is not None and given:
        raise UserError(f"{options.source} is an Orbax checkpoint of the official code; leave out {given[0]}")
    return item


def _from_orbax(item: Path, destination: Path, options: argparse.Namespace) -> str:
    """Writes the model into `destination`, which exists, and says what it is."""
    from longread.checkpoint import save_streamed
    from longread.checkpoint.official_orbax import OrbaxModel
    from longread.config import InnerConfig
    from longread.tokenizer import copy_tokenizer, load_tokenizer

    model = OrbaxModel(item, options.size, window=options.window, mini_batch=options.mini_batch)
    config, table = model.config, model.table_config
    path = _orbax_tokenizer(item, options)
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


def _orbax_tokenizer(item: Path, options: argparse.Namespace) -> Path | None:
    """The one that was named, or that lies beside the weights."""
    if options.tokenizer:
        named = Path(options.tokenizer)
        return named / "tokenizer.json" if named.is_dir() else named
    beside = [folder / "tokenizer.json" for folder in (Path(options.source), item, item.parent)]
    return next((path for path in beside if path.is_file()), None)


def _from_pretrained(found: PretrainedPlace, destination: Path, options: argparse.Namespace) -> str:
    import torch

    from longread.pretrained import Dials, convert_pretrained, open_pretrained

    chosen = {name: getattr(options, name) for name in _DIALS if getattr(options, name) is not None}
    if options.dtype:
        chosen["dtype"] = getattr(torch, options.dtype)
    if options.tokenizer:
        chosen["tokenizer"] = Path(options.tokenizer)
    opened = open_pretrained(found)
    made = convert_pretrained(opened, destination, Dials(**chosen))
    config, dtype = made.config, str(made.dtype).removeprefix("torch.")
    from_what = f", dequantised from {opened.quantisation}" if opened.quantisation else ""
    what = f"a reader of {config.num_parameters:,} parameters in {dtype}{from_what}, {made.nbytes / 2**30:.2f} GiB"
    if not config.num_suffix_blocks:
        return f"{what}, window {config.window_size:,}; none of its blocks can learn"
    return (
        f"{what}, window {config.window_size:,}; the last {config.num_suffix_blocks} of {config.num_blocks} blocks can "
        f"learn every {config.mini_batch_size:,} tokens, and it reads frozen until `longread train` has adapted it"
    )


def _to_transformers(source: Path, destination: Path, options: argparse.Namespace) -> str:
    from longread.pretrained import export_transformers

    return export_transformers(source, destination, drop_fast=options.drop_fast)


def _from_official(source: Path, destination: Path) -> str:
    from longread.checkpoint import find_tokenizer, import_official, save_model
    from longread.tokenizer import copy_tokenizer, load_tokenizer

    model, inner = import_official(source)
    path = find_tokenizer(source)
    tokenizer = load_tokenizer(path) if path else None
    V = model.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > V:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens and the model knows {V}; put its own tokenizer there"
        )
    save_model(destination, model, inner, tokenizer.fingerprint if tokenizer else None, {"converted_from": source.name})
    if path:
        copy_tokenizer(path, destination)
    return f"a Longread model of {model.config.num_parameters:,} parameters, {_with(path)}"


def _to_official(source: Path, destination: Path) -> str:
    from longread.checkpoint import export_official, load_model
    from longread.loading import tokenizer_of
    from longread.tokenizer import copy_tokenizer

    loaded = load_model(source)
    path = loaded.tokenizer_path
    if path:
        tokenizer_of(loaded, source)  # refuses another model's
    export_official(destination, loaded.model, loaded.inner)
    if path:
        copy_tokenizer(path, destination)
    return f"{OFFICIAL_WEIGHTS} and config.json in the official layout, {_with(path)}"


def _with(tokenizer: Path | None) -> str:
    return "with its tokenizer" if tokenizer else "without a tokenizer: there is none beside the model"
