"""Models as the command line opens them: weights, tokenizer and device that belong together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from longread.checkpoint import find_tokenizer, load_model
from longread.config import InnerConfig, UserError
from longread.model import Transformer, find_device
from longread.tokenizer import Tokenizer, load_tokenizer


class OpenModel(NamedTuple):
    """A model ready to read, and the tokenizer it was trained with."""

    name: str
    """Its directory's, for tables."""
    model: Transformer
    inner: InnerConfig
    tokenizer: Tokenizer
    fingerprint: str


def table_names(paths: Sequence[str]) -> list[str]:
    """What models are called in tables: their directories' names, with a number where several are named alike."""
    names = [Path(path).name or path for path in paths]
    return [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


def open_model(path: str, device: str) -> OpenModel:
    """Loads the model at `path`; on a GPU its products run in bfloat16, its fast weights stay float32.

    On a CPU a file in half precision runs in float32, which is as exact and, where products in half precision are
    emulated, many times faster.

    Raises:
        UserError: there is no model, no tokenizer, or they do not belong together; or the device cannot be used.
    """
    place = find_device(device)
    loaded = load_model(path, device=place, dtype=torch.bfloat16 if place.type == "cuda" else None)
    if loaded.tokenizer_path is None:
        raise UserError(f"{path} has no tokenizer.json beside it; copy there the one it was trained with")
    tokenizer = load_tokenizer(loaded.tokenizer_path)
    trained_on = loaded.metadata.get("tokenizer_fingerprint")
    if trained_on not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{loaded.tokenizer_path} is not the tokenizer of {path}; copy there the one it was trained with"
        )
    if tokenizer.vocab_size > loaded.model.config.vocab_size:
        raise UserError(
            f"{loaded.tokenizer_path} has {tokenizer.vocab_size} tokens and {path} knows "
            f"{loaded.model.config.vocab_size}; copy there the one it was trained with"
        )
    if place.type == "cpu" and loaded.model.dtype.itemsize < 4:
        loaded.model.float()
    loaded.model.requires_grad_(False)
    return OpenModel(Path(path).name or path, loaded.model, loaded.inner, tokenizer, loaded.fingerprint)


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the model at `path`, without its weights. Raises `UserError` as `open_model` does."""
    found = find_tokenizer(path)
    return load_tokenizer(found) if found else open_model(path, "cpu").tokenizer


def read_otherwise(
    opened: OpenModel, windows: Sequence[int] | None, mini_batches: Sequence[int] | None
) -> list[OpenModel]:
    """The same weights read with each given window and mini-batch size, every combination, and called after them.

    Both say how a text is read and shape no weight. But a model is trained for its own, so such readings show what
    the choice does at reading time, not what a model trained with it would do.

    Raises:
        UserError: the model has no window, or no mini-batches, that could be changed.
    """
    config = opened.model.config
    if windows and all(config.window_of(block) is None for block in range(config.num_blocks)):
        raise UserError(f"{opened.name} has full attention in every block; leave it out, or leave out --window")
    if mini_batches and not config.num_suffix_blocks and config.mixer != "ttt_kvb":
        raise UserError(f"{opened.name} learns nothing while it reads; leave it out, or leave out --mini-batch")
    if not windows and not mini_batches:
        return [opened]
    variants = []
    for K, M in itertools.product(windows or [config.window_size], mini_batches or [config.mini_batch_size]):
        model = Transformer(dataclasses.replace(config, window_size=K, mini_batch_size=M))
        model.load_state_dict(opened.model.state_dict(), assign=True)
        model.compute_dtype = opened.model.compute_dtype
        name = opened.name + (f", window {K}" if windows else "") + (f", mini-batch {M}" if mini_batches else "")
        variants.append(opened._replace(name=name, model=model.requires_grad_(False)))
    return variants
