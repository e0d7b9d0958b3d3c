"""A model on disk: a directory with config.json, model.safetensors and, beside them, the tokenizer's tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longread.config import InnerConfig, ModelConfig, UserError
from longread.files import atomic_files, read_json, read_tensors, write_json, write_tensors
from longread.model import Transformer, fingerprint_of, undrawn

KIND = "model"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_model(
    directory: str | Path,
    model: Transformer,
    inner: InnerConfig,
    tokenizer_fingerprint: str | None,
    extra: Mapping[str, Any] | None = None,
    *,
    learns: bool = True,
) -> None:
    """Writes or replaces a model directory; `extra` says where the model comes from and is anything JSON can hold.

    `learns` False: it was never trained to learn, so whoever opens it reads with its weights as they are.

    Raises `UserError` when it cannot be written; a model that was there before is still whole then.
    """
    directory = Path(directory)
    with atomic_files(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, config):
        write_model(weights, config, model, inner, tokenizer_fingerprint, extra, learns=learns)


def write_model(
    weights: Path,
    config: Path,
    model: Transformer,
    inner: InnerConfig,
    tokenizer_fingerprint: str | None,
    extra: Mapping[str, Any] | None,
    *,
    learns: bool = True,
) -> None:
    """Writes the two files of a model, in place."""
    fingerprint = fingerprint_of(model)
    write_tensors(weights, model.state_dict(), {"fingerprint": fingerprint}, kind=KIND)
    values = described(model.config, inner, fingerprint, tokenizer_fingerprint, extra, learns=learns)
    write_json(config, values, kind=KIND)


def described(
    config: ModelConfig,
    inner: InnerConfig,
    fingerprint: str,
    tokenizer_fingerprint: str | None,
    extra: Mapping[str, Any] | None,
    *,
    learns: bool,
) -> dict[str, Any]:
    """A model's config.json."""
    values = {
        "fingerprint": fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "model": config.as_dict(),
        "inner": inner.as_dict(),
        "provenance": dict(extra or {}),
        "model_type": "longread",  # by which Transformers knows what opens it (`longread.transformers`)
        "architectures": ["LongreadForCausalLM"],
    }
    return values if learns else values | {"learns": False}


def read_model(directory: Path) -> tuple[Transformer, InnerConfig, dict[str, Any]]:
    """The model in a model directory and what its config.json says. Raises `UserError` with the reason."""
    values = read_json(directory / CONFIG_FILE, kind=KIND)
    state, metadata = read_tensors(directory / WEIGHTS_FILE, kind=KIND)
    if metadata.get("fingerprint") != values.get("fingerprint"):
        raise UserError(f"{directory}: {CONFIG_FILE} and {WEIGHTS_FILE} are of different models; copy both again")
    config, inner = configs_of(values, directory)
    model = undrawn(config)  # no parameter is in memory twice
    check(model, state, where=directory / WEIGHTS_FILE)
    model.load_state_dict(state, assign=True)
    return model, inner, values


def configs_of(values: Mapping[str, Any], directory: Path) -> tuple[ModelConfig, InnerConfig]:
    """The config.json of a model directory. Raises `UserError` if that is no model."""
    try:
        return ModelConfig.from_dict(values["model"]), InnerConfig.from_dict(values["inner"])
    except (KeyError, UserError) as error:
        raise UserError(f"{directory / CONFIG_FILE} does not describe a model: {error}") from None


def build(config: ModelConfig) -> Transformer:
    """A model to be filled, made without moving the global random generator."""
    with torch.random.fork_rng(devices=[]):
        return Transformer(config)


def fill(model: nn.Module, state: Mapping[str, Tensor], *, where: Path) -> None:
    """Copies `state` into `model`. Raises `UserError` naming the first tensor that is missing, unknown or misshapen."""
    check(model, state, where=where)
    model.load_state_dict(state)


def check(model: nn.Module, state: Mapping[str, Tensor], *, where: Path) -> None:
    """Raises `UserError` naming the first tensor of `state` that is missing, unknown or misshapen."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{where} lacks {name}; it does not belong to this config")
        if state[name].shape != tensor.shape:
            found, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{where}: {name} has shape {found}, but the config asks for {wanted}")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise UserError(f"{where} holds {unknown[0]}, which this config has no place for")
