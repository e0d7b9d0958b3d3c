"""How much of a batch is computed at a time, and how much of it again: what fits. All bytes here are estimates."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from longread.config import REGISTERED_MIXERS, Loss, ModelConfig, RunConfig
from longread.model import free_bytes

Schedule = Literal["none", "blocks", "sqrt", "step"]
"""In the order of extra work; explained in `longread.outer_loop`."""

SHARE = 0.8
"""Of free memory that may be counted on."""
UPDATE_BYTES = 12
"""Of each parameter, when it is trained: its gradient and the two moments of AdamW."""

MIXER_NUMBERS = {"attention": (13, 0), "mamba2": (25, 25), "gated_deltanet": (25, 25), "ttt_kvb": (50, 0)}
"""Numbers a token that a mixer keeps with its norms, as multiples of D: in the type of the products, and in float32."""


class Fit(NamedTuple):
    """How a batch is computed."""

    micro_batch_size: int
    """Sequences at a time."""
    recompute: Schedule
    missing: int
    """Bytes by which the graph of a micro-batch exceeds the budget; 0 if it fits."""


def fit(config: RunConfig, *, itemsize: int, kernels: bool, budget: float) -> Fit:
    """As many sequences at a time as fit with all activations kept; if not one does, one, with the least recomputation.

    What `config` says of micro-batch and recomputation stays.

    Args:
        itemsize: bytes of a number that products run in.
        kernels: as for `graph_bytes`.
        budget: bytes for activations, see `activation_budget`.
    """
    whole = config.batch_size
    sizes = [config.micro_batch_size] if config.micro_batch_size else [n for n in range(whole, 0, -1) if whole % n == 0]
    schedule: Schedule = "none" if config.recompute == "auto" else config.recompute
    for size in sizes:
        need = graph_bytes(
            config.model,
            config.loss,
            batch_size=size,
            context_length=config.context_length,
            itemsize=itemsize,
            kernels=kernels,
        )
        if need[_of_loss(config.loss, schedule)] <= budget:
            return Fit(size, schedule, 0)
    if config.recompute == "auto":
        schedule = _first(need, budget)
    return Fit(size, schedule, max(0, math.ceil(need[_of_loss(config.loss, schedule)] - budget)))


def activation_budget(free: float, model: ModelConfig) -> float:
    """Bytes for activations, of those that are free beside the weights: a share of them, less what the update needs."""
    return SHARE * free - UPDATE_BYTES * model.num_parameters


def _first(need: dict[Schedule, int], budget: float) -> Schedule:
    return next((schedule for schedule, size in need.items() if size <= budget), min(need, key=need.__getitem__))


def _of_loss(loss: Loss, schedule: Schedule) -> Schedule:
    """The static loss knows but two."""
    return "blocks" if loss == "static" and schedule != "none" else schedule


def choose_recompute(
    config: ModelConfig,
    loss: Loss,
    *,
    batch_size: int,
    context_length: int,
    itemsize: int,
    device: torch.device,
    budget: float | None = None,
) -> Schedule:
    """The schedule that recomputes least among those that fit, or the leanest if none does.

    Args:
        itemsize: bytes of a number that products run in.
        budget: bytes for the graph of one outer step; None: 80 % of what is free on the device now.
    """
    need = graph_bytes(
        config,
        loss,
        batch_size=batch_size,
        context_length=context_length,
        itemsize=itemsize,
        kernels=device.type == "cuda",
    )
    return _first(need, SHARE * free_bytes(device) if budget is None else budget)


def graph_bytes(
    config: ModelConfig, loss: Loss, *, batch_size: int, context_length: int, itemsize: int, kernels: bool
) -> dict[Schedule, int]:
    """Bytes of activations that a loss keeps for its gradient, for each schedule it has, in the order of extra work.

    Args:
        kernels: whether our kernels for NVIDIA GPUs answer, which keep less than PyTorch's.
    """
    tokens, count = batch_size * context_length, context_length // config.mini_batch_size
    static = loss == "static"
    depth = config.num_blocks if static else config.num_prefix_blocks + 1
    block = tokens * block_bytes(config, context_length, itemsize, kernels=kernels)
    attention = sum("attention" in config.mixers_of(i) for i in range(depth))
    kept, again = depth * block, (depth + attention) * tokens * config.width * itemsize + block
    if static:
        return {"none": kept, "blocks": again}
    activations, carry = step_bytes(config, batch_size, itemsize, kernels=kernels)
    root = math.ceil(math.sqrt(count))
    return {
        "none": kept + count * activations,
        "blocks": again + count * activations,
        "sqrt": again + root * (activations + carry),
        "step": again + activations + count * carry,
    }


def block_bytes(config: ModelConfig, context_length: int, itemsize: int, *, kernels: bool) -> int:
    """Bytes a token that a block over a whole sequence keeps, counted on CPUs; those of attention agree with an H200's.

    The MLP keeps 3 F numbers. A window shorter than the sequence costs 13 D more without kernels.
    """
    banded = 0 if kernels or config.attention == "full" or config.window_size >= context_length else 13
    mixing = 0
    for kind in (kind for i in range(config.num_blocks) for kind in config.mixers_of(i)):
        narrow, wide = MIXER_NUMBERS[kind] if kind in MIXER_NUMBERS else REGISTERED_MIXERS[kind].kept_numbers
        mixing += (narrow + (banded if kind == "attention" else 0)) * itemsize + wide * max(4, itemsize)
    return config.width * mixing // config.num_blocks + 3 * config.mlp_hidden * itemsize


def step_bytes(config: ModelConfig, batch_size: int, itemsize: int, *, kernels: bool = False) -> tuple[int, int]:
    """Bytes that one inner step keeps for its exact gradient, and bytes of a carry.

    On CPUs the graph of a suffix block holds about 44 D + 20 F numbers a token, attention its scores five times, and
    the fast weights are there three times: old, new and their gradient. With `kernels` it is about 22 D + 10 F, 16 D
    for attention, the weights once in the type of the products, and the logits once.
    """
    B, M, D, F = batch_size, config.mini_batch_size, config.width, config.mlp_hidden
    S, attentions = config.num_suffix_blocks, max(0, config.num_suffix_blocks - 1)
    weights = B * config.num_fast_weights * 4
    past = attentions * 2 * B * config.window_size * D * itemsize
    if kernels:
        numbers, held = S * (22 * D + 10 * F) + attentions * 16 * D + config.vocab_size, weights * itemsize // 4
    else:
        scores = 5 * config.num_heads * (config.window_size + M)
        numbers, held = S * (44 * D + 20 * F) + attentions * scores, 3 * weights
    return B * M * numbers * itemsize + held, weights + past
