"""Convert between a Longread model and the layout of the official implementation's numbers.

Example:
  longread convert tests/parity/09-e2e-long converted      (official to Longread)
  longread convert runs/toy official                       (Longread to official)
"""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "convert"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("source", metavar="SOURCE", help="a model, a run, or a folder with weights.safetensors")
    parser.add_argument("destination", metavar="DIR", help="a new directory")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.checkpoint import export_official, import_official, load_model, save_model
    from longread.config import UserError

    source, destination = Path(options.source), Path(options.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} already exists; give the name of a new directory")
    if (source / "weights.safetensors").is_file():
        model, inner = import_official(source)
        save_model(destination, model, inner, None, {"converted_from": source.name})
        print(f"{destination}: a Longread model of {model.config.num_parameters:,} parameters, without a tokenizer")
    else:
        loaded = load_model(source)
        export_official(destination, loaded.model, loaded.inner)
        print(f"{destination}: weights.safetensors and config.json in the official layout")
    return 0
