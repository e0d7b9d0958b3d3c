"""Convert between a Longread model and the layout of the official implementation's numbers.

Example:
  longread convert tests/parity/09-e2e-long converted      (official to Longread)
  longread convert runs/toy official                       (Longread to official)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from longread.config import UserError

NAME = "convert"
OFFICIAL_WEIGHTS = "weights.safetensors"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("source", metavar="SOURCE", help="a model, a run, or a folder with weights.safetensors")
    parser.add_argument("destination", metavar="DIR", help="a new directory")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.files import remove_tree, temporary_sibling, writing
    from longread.loading import find_model

    source, destination = find_model(options.source), Path(options.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} already exists; give the name of a new directory")
    aside = temporary_sibling(destination)
    convert = _from_official if (source / OFFICIAL_WEIGHTS).is_file() else _to_official
    try:
        with writing(destination):
            aside.mkdir(parents=True)
            what = convert(source, aside)
            os.replace(aside, destination)
    finally:
        remove_tree(aside)
    print(f"{destination}: {what}")
    return 0


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
