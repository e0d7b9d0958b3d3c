"""How much of a batch is computed at a time, and how much of it again: what fits. All bytes here are estimates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from longread.config import (
    REGISTERED_MIXERS,
    SCHEDULES,
    Loss,
    ModelConfig,
    Recomputation,
    Recompute,
    RunConfig,
    recomputation,
)
from longread.model import free_bytes
from longread.ops.cross_entropy.chunked import CHUNK

SHARE = 0.8
"""Of free memory that may be counted on."""
GRADIENT_BYTES, MOMENT_BYTES = 4, 8
"""Of each parameter, when it is trained: its gradient, and the two moments of AdamW, which ranks may divide."""
UPDATE_BYTES = GRADIENT_BYTES + MOMENT_BYTES

MIXER_NUMBERS = {"mamba2": (25, 25), "gated_deltanet": (25, 25), "ttt_kvb": (50, 0)}
"""Numbers a token that a mixer keeps with its norms, as multiples of D: in the type of the products, and in float32."""
LOGITS_BYTES = 2**30
"""Of logits, that our kernels have at a time; what fits into one such piece they keep for the gradient."""


class Fit(NamedTuple):
    """How a batch is computed."""

    micro_batch_size: int
    """Sequences at a time."""
    recompute: Recompute
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
    schedule = "none" if config.recompute == "auto" else config.recompute
    for size in sizes:
        need = graph_bytes(
            config.model,
            config.loss,
            batch_size=size,
            context_length=config.context_length,
            itemsize=itemsize,
            kernels=kernels,
            trained_blocks=config.trained_blocks,
        )
        if need[schedule] <= budget:
            return Fit(size, schedule, 0)
    if config.recompute == "auto":
        schedule = _first(need, budget)
    return Fit(size, schedule, max(0, math.ceil(need[schedule] - budget)))


def activation_budget(free: float, model: ModelConfig, trained_blocks: int | None = None, *, divided: int = 1) -> float:
    """Bytes for activations, of those that are free beside the weights: a share of them, less what the update needs.

    Args:
        divided: ranks that divide the moments; each also holds the sum of its rows' gradients then.
    """
    update = UPDATE_BYTES if divided == 1 else GRADIENT_BYTES + (GRADIENT_BYTES + MOMENT_BYTES) / divided
    return SHARE * free - update * num_trained(model, trained_blocks)


def num_trained(model: ModelConfig, trained_blocks: int | None) -> int:
    """Numbers that training changes: all, or those of the last `trained_blocks` blocks and of the final norm."""
    if trained_blocks is None:
        return model.num_parameters
    below = model.num_blocks - trained_blocks
    if not below:
        return model.num_parameters - model.vocab_size * model.width * (1 if model.tie_embeddings else 2)
    rest = dataclasses.replace(
        model,
        num_blocks=below,
        num_suffix_blocks=max(0, model.num_suffix_blocks - trained_blocks),
        block_rope=model.block_rope and model.block_rope[:below],
        block_windows=model.block_windows and model.block_windows[:below],
    )
    return model.num_parameters - rest.num_parameters + model.width


def _first(need: dict[Recompute, int], budget: float) -> Recompute:
    return next((schedule for schedule, size in need.items() if size <= budget), min(need, key=need.__getitem__))


def choose_recompute(
    config: ModelConfig,
    loss: Loss,
    *,
    batch_size: int,
    context_length: int,
    itemsize: int,
    device: torch.device,
    budget: float | None = None,
) -> Recompute:
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
    config: ModelConfig,
    loss: Loss,
    *,
    batch_size: int,
    context_length: int,
    itemsize: int,
    kernels: bool,
    trained_blocks: int | None = None,
) -> dict[Recompute, int]:
    """Bytes of activations that a loss keeps for its gradient, for each schedule, in the order of extra work.

    Args:
        kernels: whether our kernels for NVIDIA GPUs answer, which keep less than PyTorch's.
        trained_blocks: as in `RunConfig`; below the lowest one nothing is kept.
    """
    tokens, count = batch_size * context_length, context_length // config.mini_batch_size
    static, L = loss == "static", config.num_blocks
    lowest = L - (L if trained_blocks is None else trained_blocks)
    whole = range(lowest, L if static else config.num_prefix_blocks + 1)  # over the whole sequence
    block = tokens * block_bytes(config, context_length, itemsize, kernels=kernels)
    head = sum(head_bytes(config, tokens, itemsize, kernels=kernels))
    _, passing = head_bytes(config, batch_size * config.mini_batch_size, itemsize, kernels=kernels)
    activations, carry = step_bytes(config, batch_size, itemsize, kernels=kernels)

    def size_of(again: Recomputation) -> int:
        bare = [i for i in whole if i < again.blocks]
        results = 0 if again.attention else sum("attention" in config.mixers_of(i) for i in bare)
        numbers = len(bare) * config.width + results * config.num_heads * config.head_dim
        kept, running = (len(whole) - len(bare)) * block, min(1, len(bare)) * block
        size = tokens * numbers * itemsize
        if static:
            return size + max(kept + head, running)  # the head is done before a block runs again
        steps = count - again.steps
        carries = -(-count // steps) if again.steps else 0
        return size + max(kept, running) + steps * activations + carries * carry + passing

    schedules = _schedules(whole.stop, count)
    return {schedule: size_of(recomputation(schedule, config, loss, context_length)) for schedule in schedules}


def _schedules(blocks: int, count: int) -> Iterator[Recompute]:
    """All there are for so many blocks over whole sequences and so many mini-batches; names before numbers."""
    yield "none"
    yield from (f"{number}-blocks" for number in range(1, blocks))
    yield from ("blocks", f"{blocks}-blocks")
    root = count - math.ceil(math.sqrt(count))
    for number in range(1, count):
        yield from ["sqrt"] * (number == root)
        yield from ["step"] * (number == count - 1)
        yield f"{number}-steps"
    yield from SCHEDULES


def block_bytes(config: ModelConfig, context_length: int, itemsize: int, *, kernels: bool) -> int:
    """Bytes a token that a block over a whole sequence keeps, counted on CPUs; those of attention agree with an H200's.

    With Q = N H and E = numbers of its keys, attention and the norms around both sub-layers keep up to 6 D + 4 Q + 3 E,
    less without some of the norms, and the MLP 3 F. A window shorter than the sequence costs 5 Q + 8 E more without
    kernels: bands of keys overlap.
    """
    D, Q, E, L = config.width, config.num_heads * config.head_dim, config.kv_width, config.num_blocks
    sub_layers = (2 + 2 * config.pre_norm + 2 * config.post_norm) * D
    narrow, wide = L * 3 * config.mlp_hidden, 0
    for index in range(L):
        for kind in config.mixers_of(index):
            if kind == "attention":
                narrow += sub_layers + (3 + config.qk_norm) * Q + (2 + config.qk_norm) * E
                window = config.window_of(index)
                narrow += 0 if kernels or window is None or window >= context_length else 5 * Q + 8 * E
            else:
                own = MIXER_NUMBERS[kind] if kind in MIXER_NUMBERS else REGISTERED_MIXERS[kind].kept_numbers
                narrow, wide = narrow + own[0] * D, wide + own[1] * D
    return (narrow * itemsize + wide * max(4, itemsize)) // L


def head_bytes(config: ModelConfig, tokens: int, itemsize: int, *, kernels: bool) -> tuple[int, int]:
    """Bytes of the logits of `tokens` that are kept for the gradient, and that are there only while they are made."""
    if not kernels:
        return 0, 3 * tokens * min(config.vocab_size, CHUNK) * max(4, itemsize)
    size = tokens * config.vocab_size * itemsize
    return (size if size <= LOGITS_BYTES else 0), 2 * min(size, LOGITS_BYTES)


def step_bytes(config: ModelConfig, batch_size: int, itemsize: int, *, kernels: bool = False) -> tuple[int, int]:
    """Bytes that one inner step keeps for its exact gradient, and bytes of a carry.

    On CPUs the graph of a suffix block holds about 44 D numbers a token and 10 for each unit of both its MLPs,
    attention its scores five times, and the fast weights are there three times: old, new and their gradient. With
    `kernels` it is about 22 D and 5 a unit, 4 D + 6 Q + 6 E for attention (as in `block_bytes`), the weights once in
    the type of the products, and the logits once.
    """
    B, M, D = batch_size, config.mini_batch_size, config.width
    Q, E, F = config.num_heads * config.head_dim, config.kv_width, config.mlp_hidden + config.fast_mlp_hidden
    S, above = config.num_suffix_blocks, range(config.num_prefix_blocks + 1, config.num_blocks)
    windows = [config.window_of(index) or config.window_size for index in above]
    weights = B * config.num_fast_weights * 4
    past = 2 * B * sum(windows) * E * itemsize
    if kernels:
        numbers, held = S * (22 * D + 5 * F) + len(above) * (4 * D + 6 * Q + 6 * E), weights * itemsize // 4
        held += head_bytes(config, B * M, itemsize, kernels=True)[0]
    else:
        scores = 5 * config.num_heads * sum(window + M for window in windows)
        numbers, held = S * (44 * D + 10 * F) + scores, 3 * weights
    return B * M * numbers * itemsize + held, weights + past
