"""The beginning of a run: its network, new weights or those of another model, its batches, and a tokenizer.

How a text is read may differ (window, mini-batch, attention, rotary base): it shapes no weight. And a run without fast
weights may begin with a model that has some, so that a pretrained network's SWA and full-attention twins begin alike.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longread.checkpoint import LoadedModel, find_tokenizer, load_model
from longread.config import ModelConfig, Precision, RunConfig, UserError
from longread.data import RecallSampler, Sampler, TokenDataset
from longread.data.recall import check_share
from longread.files import atomic_files
from longread.model import Transformer, initialize, undrawn
from longread.recipes import without_fast_weights
from longread.tokenizer import load_tokenizer
from longread.train.agreement import differences
from longread.train.optimizer import freeze_below

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""The tokenizer, and what pretrained models say beside it: how chats are written, and where answers end."""
UNKNOWN: dict[str, Any] = {}
"""The beginning of a run without a record of it."""
_MAY_DIFFER = ("rope_base", "init_std", "window_size", "mini_batch_size", "attention")


def new_model(config: RunConfig, precision: Precision, device: torch.device, *, drawn: bool) -> Transformer:
    """Of drawn weights, or of none yet: drawing billions that nobody reads takes minutes."""
    model = Transformer(config.model) if drawn else undrawn(config.model)
    if drawn:
        initialize(model, config.seed)
    freeze_below(model, config.trained_blocks)
    if precision == "bfloat16":
        model.compute_dtype = torch.bfloat16
    model.to(torch.float64 if precision == "float64" else torch.float32)
    return model.to(device) if drawn else model.to_empty(device=device)


def training_sampler(config: RunConfig, data: TokenDataset) -> Sampler:
    """The batches of a run. Raises `UserError` for facts to recall that cannot be written or are too few."""
    sizes = config.context_length, config.batch_size, config.seed
    if not config.recall:
        return Sampler(data, *sizes)
    if data.tokenizer_path is None:
        raise UserError(
            f"recall is {config.recall}, but {data.directory} has no tokenizer to write facts with; prepare it with one"
        )
    tokenizer = load_tokenizer(data.tokenizer_path)
    check_share(config.recall, config.context_length, tokenizer)
    return RecallSampler(data, *sizes, share=config.recall, tokenizer=tokenizer)


def fill_first_weights(
    model: Transformer,
    given: str | Path | None,
    begun: dict[str, Any] | None,
    *,
    out: Path,
    tokenizer_fingerprint: str | None,
    has_checkpoint: bool,
) -> dict[str, Any] | None:
    """Fills the model with the weights that the run `out` begins with, and says for run.json which they are.

    A run that was begun keeps to them: given others, it is refused; given none, it reads those that run.json names if
    there is no checkpoint yet. `begun` is what run.json says of them, or `UNKNOWN`.
    """
    path = given
    if given is None and begun and not has_checkpoint:
        path = begun["path"]
    if path is None:
        return None
    loaded = load_model(path)
    if begun is not UNKNOWN and (begun is None or begun["fingerprint"] != loaded.fingerprint):
        weights = "new weights" if begun is None else f"the weights of {begun['path']} ({begun['fingerprint'][:8]})"
        remedy = "" if given is None else "resume without it, or "
        raise UserError(
            f"{out} began with {weights}, and {path} holds others ({loaded.fingerprint[:8]}); "
            f"{remedy}train into another directory"
        )
    begin_with(model, loaded, path, tokenizer_fingerprint)
    found = {"path": os.path.realpath(path), "fingerprint": loaded.fingerprint}
    provenance = loaded.metadata.get("provenance")
    return found | ({"provenance": provenance} if provenance else {})


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
