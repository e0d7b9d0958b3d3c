"""What a run takes over from a model that it begins with: weights, as far as its network is that of the run; tokenizer.

How a text is read may differ (window, mini-batch, attention, rotary base): it shapes no weight. And a run without fast
weights may begin with a model that has some, so that a pretrained network's SWA and full-attention twins begin alike.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longread.checkpoint import LoadedModel, find_tokenizer
from longread.config import ModelConfig, UserError
from longread.files import atomic_files
from longread.model import Transformer
from longread.recipes import without_fast_weights
from longread.train.agreement import differences

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""The tokenizer, and what pretrained models say beside it: how chats are written, and where answers end."""
_MAY_DIFFER = ("rope_base", "init_std", "window_size", "mini_batch_size", "attention")


def begin_with(model: Transformer, loaded: LoadedModel, path: str | Path, tokenizer_fingerprint: str | None) -> None:
    """Fills `model` with the weights of another, which was loaded from `path`.

    Raises:
        UserError: it is another network, or its tokens are of another tokenizer.
    """
    before, now = loaded.model.config, model.config
    if before.mixer != now.mixer:
        raise UserError(
            f"{path} has model.mixer {before.mixer} and this run has {now.mixer}; begin with a model of its kind"
        )
    drops = before.num_suffix_blocks > 0 == now.num_suffix_blocks
    of_its_kind = without_fast_weights(before) if drops else before
    for name, old, new in differences(_shape(of_its_kind), _shape(now), "model."):
        raise UserError(f"{path} has {name} {old!r} and this run has {new!r}; begin with a model of its shape")
    if loaded.metadata.get("tokenizer_fingerprint") != tokenizer_fingerprint:
        raise UserError(
            f"{path} was trained with another tokenizer than the data; prepare the data with "
            f"`longread prepare --tokenizer {path}`"
        )
    weights = loaded.model.state_dict()
    model.load_state_dict(_static(weights, before, path) if drops else weights)


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _MAY_DIFFER}


def _static(weights: dict[str, Tensor], config: ModelConfig, path: str | Path) -> dict[str, Tensor]:
    """The weights of the same network without fast MLPs.

    It computes the same where, in each block, one of the two MLPs adds nothing: the other is the static one then.
    """
    found = {name: tensor for name, tensor in weights.items() if ".fast_mlp." not in name}
    missed = 0
    for block in range(config.num_prefix_blocks, config.num_blocks):
        fast, static = (
            {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            for prefix in (f"blocks.{block}.fast_mlp.", f"blocks.{block}.static_mlp.")
        )
        if not _adds_something(fast):
            continue
        if not _adds_something(static) and {n: t.shape for n, t in fast.items()} == {
            n: t.shape for n, t in static.items()
        }:
            found |= {f"blocks.{block}.static_mlp.{name}": tensor for name, tensor in fast.items()}
        else:
            missed += 1
    if missed:
        warnings.warn(
            f"this run has no fast MLPs, and those of {missed} blocks of {path} compute something: without them it is "
            "no twin of that model",
            stacklevel=6,
        )
    return found


def _adds_something(mlp: dict[str, Tensor]) -> bool:
    """Whether a sub-layer changes the residual stream: not if its last matrix, or the norm behind it, is 0."""
    last = [mlp[name] for name in ("down.weight", "post_norm.weight") if name in mlp]
    return all(bool(torch.count_nonzero(tensor)) for tensor in last)


def keep_tokenizer(initial: Mapping[str, Any] | None, data: Path, out: Path) -> None:
    """Leaves the tokenizer in the run `out`: that of the model it began with, which says more than that of the data."""
    own = find_tokenizer(initial["path"]) if initial else None
    if initial and own is None and (out / TOKENIZER_FILES[0]).is_file():
        return  # that model has gone since
    copy_tokenizer(own.parent if own else data, out)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer in the directory `source`, and what lies beside it."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with atomic_files(directory / name) as (temporary,):
                shutil.copyfile(source / name, temporary)
