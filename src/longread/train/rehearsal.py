"""What a step launches on a GPU, on tensors without memory (`longread.ops.precompile`)."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch

from longread.config import RunConfig
from longread.data import Batch
from longread.inner_loop import few_blocks
from longread.model import undrawn
from longread.ops.precompile import precompile
from longread.train.gradient import accumulate_gradient
from longread.train.optimizer import freeze_below

_BEYOND_THE_WINDOW = 3
"""Mini-batches of a sequence that no attention reaches across: more would launch the same kernels."""


def precompile_step(config: RunConfig, device: torch.device) -> None:
    """Begins to compile what the steps of a run launch on a GPU; `config` leaves nothing open."""
    precompile(rehearse_step, config.as_dict(), device=device)


def rehearse_step(run_config: dict[str, Any]) -> None:
    """Takes the gradient of one micro-batch; `run_config` as `as_dict` gives it."""
    config = RunConfig.from_dict(run_config)
    if config.model.mixer != "attention":
        return
    network = few_blocks(config.model) if config.trained_blocks is None else config.model
    model = undrawn(network)
    freeze_below(model, config.trained_blocks)
    if config.precision == "bfloat16":
        model.compute_dtype = torch.bfloat16
    M = network.mini_batch_size
    longest = M * (math.ceil(network.window_size / M) + _BEYOND_THE_WINDOW)
    shape = config.micro_batch_size or config.batch_size, min(config.context_length, longest)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    recompute = re.sub(r"\d+-blocks", "1-blocks", re.sub(r"\d+-steps", "sqrt", config.recompute))  # there are few here
    config = dataclasses.replace(config, batch_size=shape[0], micro_batch_size=None, recompute=recompute)
    accumulate_gradient(model, config, batch, inner_lr=torch.zeros((), device="meta"))
