"""Models as the command line opens them: weights, tokenizer and device that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from longread.checkpoint import load_model
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


def open_model(path: str, device: str) -> OpenModel:
    """Loads the model at `path`; on a GPU its products run in bfloat16, its fast weights stay float32.

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
    loaded.model.requires_grad_(False)
    return OpenModel(Path(path).name or path, loaded.model, loaded.inner, tokenizer, loaded.fingerprint)
