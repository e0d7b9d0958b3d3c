"""Models as a command is given several of them: their names in tables, and other ways to read with one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from longread.config import UserError
from longread.loading import OpenModel, open_model
from longread.model import Transformer

__all__ = ["OpenModel", "open_model", "read_otherwise", "table_names"]


def table_names(paths: Sequence[str]) -> list[str]:
    """What models are called in tables: their directories' names, with a number where several are named alike."""
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
        model = Transformer(dataclasses.replace(config, window_size=K, mini_batch_size=M))
        model.load_state_dict(opened.model.state_dict(), assign=True)
        model.compute_dtype = opened.model.compute_dtype
        name = opened.name + (f", window {K}" if windows else "") + (f", mini-batch {M}" if mini_batches else "")
        variants.append(opened._replace(name=name, model=model.requires_grad_(False)))
    return variants
