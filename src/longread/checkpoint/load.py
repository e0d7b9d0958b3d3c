"""Loads a model from wherever one lies: a model directory, a run, or a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from longread.checkpoint.model import CONFIG_FILE, KIND, configs_of, read_model
from longread.checkpoint.training import CHECKPOINTS, MARKER_FILE, newest_checkpoint, verify_checkpoint
from longread.config import InnerConfig, ModelConfig, UserError
from longread.files import read_json
from longread.model import Transformer

TOKENIZER_FILE = "tokenizer.json"


class LoadedModel(NamedTuple):
    """A model and what was stored with it."""

    model: Transformer
    inner: InnerConfig
    tokenizer_path: Path | None
    """The tokenizer.json that belongs to the model; None if none lies where it should."""
    fingerprint: str
    """SHA-256 of the stored model, whatever dtype it was loaded in."""
    metadata: dict[str, Any]
    """The entries of config.json: the tokenizer's fingerprint and where the model comes from."""

    @property
    def learns(self) -> bool:
        """Whether it was trained to learn while it reads; a model that was only converted was not."""
        return self.metadata.get("learns") is not False


class ModelDescription(NamedTuple):
    """A model as its files describe it, but for its weights."""

    path: Path
    config: ModelConfig
    inner: InnerConfig
    learns: bool
    """Whether it was trained to learn while it reads; one that was only converted was not."""


def describe_model(path: str | Path) -> ModelDescription:
    """Of what `load_model` loads all but the weights, which stay unread."""
    directory = _find(Path(path))
    values = read_json(directory / CONFIG_FILE, kind=KIND)
    return ModelDescription(Path(path), *configs_of(values, directory), values.get("learns") is not False)


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Loads a model from a model directory, a run (its final model, else its newest checkpoint) or a checkpoint.

    `dtype` None keeps the stored one. Gains that are stored wider than the matrices stay as they are. Raises
    `UserError` with the reason if there is no model at `path`, if it is damaged, or if its weights are not those of
    its config.
    """
    path = Path(path)
    model, inner, metadata = read_model(_find(path))
    model.to(device=device)
    if dtype is not None:
        _cast(model, dtype)
    return LoadedModel(model, inner, find_tokenizer(path), metadata["fingerprint"], metadata)


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer.json of the model, run or checkpoint at `path`, none of which is read; None if it is missing."""
    path = Path(path)
    if _is_checkpoint(path):
        directory = path.parent.parent
    elif not (path / CONFIG_FILE).is_file() and (path / KIND / CONFIG_FILE).is_file():
        directory = path / KIND
    else:
        directory = path
    found = directory / TOKENIZER_FILE
    return found if found.is_file() else None


def _find(path: Path) -> Path:
    """The directory of the weights."""
    if not path.exists():
        raise UserError(f"there is no model at {path}; give a model, a run or a checkpoint directory")
    if _is_checkpoint(path):
        verify_checkpoint(path)
        return path
    if (path / CONFIG_FILE).is_file():
        return path
    if (path / KIND / CONFIG_FILE).is_file():
        return path / KIND
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"there is no model at {path}: it has no {CONFIG_FILE}, no {KIND}/ and no finished checkpoint")
    return checkpoint


def _cast(model: Transformer, dtype: torch.dtype) -> None:
    """Parameters of the type that the embedding has, in `dtype`: all of them, unless the gains were stored wider."""
    stored = model.embedding.weight.dtype
    for parameter in model.parameters():
        if parameter.dtype == stored or parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == CHECKPOINTS or (path / MARKER_FILE).exists()
