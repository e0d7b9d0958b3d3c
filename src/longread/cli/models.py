"""Models as a command is given several of them: their names in tables, and other ways to read with one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from longread.config import ModelConfig, UserError
from longread.loading import OpenModel
from longread.model import undrawn


def table_names(paths: Sequence[str]) -> list[str]:
    """The names of models in tables: their directories' names, with a number where several are named alike."""
    names = [Path(path).name or path for path in paths]
    return [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


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
        name = opened.name + (f", window {K}" if windows else "") + (f", mini-batch {M}" if mini_batches else "")
        variants.append(_read_by(opened, dataclasses.replace(config, window_size=K, mini_batch_size=M), name))
    return variants


def read_whole(opened: OpenModel) -> OpenModel:
    """The same weights read frozen with full attention: what a converted model was before its windows.

    Limits of single blocks stay, as its pretraining had them. Raises `UserError` for a network of other mixers.
    """
    config = opened.model.config
    if config.mixer != "attention":
        raise UserError(f"{opened.name} has model.mixer {config.mixer}; leave it out of --full")
    whole = _read_by(
        opened, dataclasses.replace(config, attention="full", kept_tokens=0), f"{opened.name}, full attention"
    )
    return whole._replace(learns=False)


def _read_by(opened: OpenModel, config: ModelConfig, name: str) -> OpenModel:
    """The weights of `opened` in another network that they fit."""
    model = undrawn(config)
    model.load_state_dict(opened.model.state_dict(), assign=True)
    model.compute_dtype, model.known_tokens = opened.model.compute_dtype, opened.model.known_tokens
    return opened._replace(name=name, model=model.requires_grad_(False))
