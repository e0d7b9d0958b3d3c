"""The model that a SOURCE names: a Transformers directory, a GGUF file, or a model in the Hugging Face Hub's cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from longread.config import UserError
from longread.files import FORMAT
from longread.pretrained.families import Network, network_of
from longread.pretrained.gguf_config import network_in
from longread.pretrained.gguf_source import GGUFSource
from longread.pretrained.hub import find_cached, is_hub_name
from longread.pretrained.safetensors_source import SafetensorsSource
from longread.pretrained.source import TensorSource

CONFIG_FILE = "config.json"
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


class PretrainedPlace(NamedTuple):
    """Where a pretrained model lies, and what it is called."""

    path: Path
    """A directory, or a GGUF file."""
    name: str
    """On the Hub, or the last part of its path."""
    revision: str | None = None


class Opened(NamedTuple):
    """A pretrained model: what it is, and its weights, of which none is read yet."""

    found: PretrainedPlace
    network: Network
    weights: TensorSource
    licence: str | None
    quantisation: str | None
    """Kinds of quantised weights, which are dequantised when they are read."""


def find_pretrained(source: str) -> PretrainedPlace | None:
    """The pretrained model that `source` names; None if something else lies there, or nothing.

    Raises:
        UserError: it can only be a name of the Hub and is not in its cache, or a directory holds several GGUF files.
    """
    path = Path(source)
    if path.is_file():
        return PretrainedPlace(path, path.name) if path.suffix == ".gguf" else None
    if path.is_dir():
        return _in_directory(path, path.resolve().name, None)
    if is_hub_name(source):
        cached = find_cached(source)
        return _in_directory(cached.directory, source, cached.revision) or PretrainedPlace(
            cached.directory, source, cached.revision
        )
    return None


def open_pretrained(found: PretrainedPlace) -> Opened:
    """Reads what is said of a model, and the headers of its weights.

    Raises:
        UserError: a file is missing, damaged or quantised, or Longread's network cannot be this one.
    """
    if found.path.suffix == ".gguf" and found.path.is_file():
        weights = GGUFSource(found.path)
        licence = weights.metadata.get("general.license")
        return Opened(found, network_in(weights), weights, licence, weights.quantisation)
    path = found.path / CONFIG_FILE
    values = _config(path)
    if values is None:
        raise UserError(f"{path} is missing or no JSON object; give a directory as Transformers saves it, or a GGUF")
    network = network_of(values, path)
    return Opened(found, network, SafetensorsSource(found.path), _licence(found.path), None)


def _in_directory(directory: Path, name: str, revision: str | None) -> PretrainedPlace | None:
    values = _config(directory / CONFIG_FILE)
    if values is not None and values.get("format") != FORMAT and "model_type" in values:
        return PretrainedPlace(directory, name, revision)
    if values is None:
        files = sorted(directory.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise UserError(f"{directory} holds several GGUF files ({names}); give the path of one")
        if files:
            return PretrainedPlace(files[0], name if revision else files[0].name, revision)
    return None


def _config(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _licence(directory: Path) -> str | None:
    """The metadata at the head of the model's card."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    match = _LICENCE.search(head)
    return match.group(1) if match else None
