"""What a measure cannot do without: floating-point operations and bytes, counted from a config alone.

A multiplication with its addition counts 2. Products are counted once: what an implementation computes again, and
everything that is no product, is its own loss. One forward of a token, with v keys visible on average:

    attention of a block      4 D (N + G) H + 4 N H v    projections; scores and mixing; G heads of keys and values
    an MLP                    6 D F
    head                      2 D V

and in units of that:

    training, static loss     3                   forward, gradients of activations and of weights
    training, end to end      3 below the lowest fast MLP, 6 above it: the inner gradient is itself differentiated
    reading, frozen           1
    reading, learning         1 below; above it 2, and 1 more for the weight gradient of each fast MLP; nothing for
                              the gradient of the lowest one's input, which nobody asks for

What a schedule of recomputation runs once more is told apart (`recomputed_flops`).
"""

from __future__ import annotations

import math
from typing import Literal

from longread.config import Loss, ModelConfig


def visible_keys(tokens: int, window: int | None) -> float:
    """Keys that a query sees on average over `tokens` positions from the first on, its own included."""
    K = tokens if window is None else min(window, tokens)
    return (K * (K + 1) / 2 + (tokens - K) * K) / tokens


def attention_flops(config: ModelConfig, block: int, tokens: int) -> float:
    """Of one token in the attention of `block`."""
    return projection_flops(config) + score_flops(config, block, tokens)


def projection_flops(config: ModelConfig) -> float:
    """Of one token's queries, keys, values and output in one attention."""
    return 4 * config.width * (config.num_heads * config.head_dim + config.kv_width)


def score_flops(config: ModelConfig, block: int, tokens: int) -> float:
    """Of one token's scores in the attention of `block`, and of mixing values by them."""
    return 4 * config.num_heads * config.head_dim * visible_keys(tokens, config.window_of(block))


def mlp_flops(config: ModelConfig, *, fast: bool = False) -> float:
    """Of one token in one MLP, a static or a fast one."""
    return 6 * config.width * (config.fast_mlp_hidden if fast else config.mlp_hidden)


def head_flops(config: ModelConfig) -> float:
    """Of the logits of one token."""
    return 2 * config.width * config.vocab_size


def lower_flops(config: ModelConfig, tokens: int) -> float:
    """Of one token in `Transformer.lower`: the prefix, and the attention of the first suffix block."""
    attentions = min(config.num_prefix_blocks + 1, config.num_blocks)
    return (
        sum(attention_flops(config, i, tokens) for i in range(attentions))
        + config.num_prefix_blocks * mlp_flops(config)  # static ones
    )


def upper_flops(config: ModelConfig, tokens: int) -> float:
    """Of one token in `Transformer.upper`: two MLPs in each suffix block, and the other attentions."""
    attentions = range(config.num_prefix_blocks + 1, config.num_blocks)
    mlps = config.num_suffix_blocks * (mlp_flops(config) + mlp_flops(config, fast=True))
    return sum(attention_flops(config, i, tokens) for i in attentions) + mlps


def training_flops(config: ModelConfig, tokens: int, loss: Loss) -> float:
    """Of one token of a training sequence of `tokens`."""
    below, above = lower_flops(config, tokens), upper_flops(config, tokens) + head_flops(config)
    return 3 * below + (6 if loss == "end-to-end" else 3) * above


def recomputed_flops(
    config: ModelConfig, tokens: int, loss: Loss, recompute: Literal["none", "blocks", "sqrt", "step"]
) -> float:
    """Of one token of a training sequence of `tokens`, what is computed again besides (`longread.outer_loop`).

    Blocks over whole sequences run forward once more without their scores, and all inner steps but those of the last
    segment, each as when it is read: forward, and the gradient of the fast weights.
    """
    if recompute == "none":
        return 0.0
    L, prefix = config.num_blocks, config.num_prefix_blocks
    if loss == "static":
        fast = config.num_suffix_blocks * mlp_flops(config, fast=True)
        return L * (projection_flops(config) + mlp_flops(config)) + fast
    blocks = min(prefix + 1, L) * projection_flops(config) + prefix * mlp_flops(config)
    if recompute == "blocks":
        return blocks
    steps = tokens // config.mini_batch_size
    last = 1 if recompute == "step" else math.ceil(math.sqrt(steps))
    step = reading_flops(config, tokens) - lower_flops(config, tokens)
    return blocks + step * (steps - last) / steps


def reading_flops(config: ModelConfig, tokens: int, *, scored: bool = True) -> float:
    """Of one token of a text of `tokens`, learning if there are fast weights; unscored, it has no logits."""
    below, above, head = lower_flops(config, tokens), upper_flops(config, tokens), head_flops(config)
    if config.num_suffix_blocks:
        fast = mlp_flops(config, fast=True)
        unread = 2 / 3 * fast  # what the gradient of the lowest fast MLP's input would take
        return below + 2 * (above + head) + config.num_suffix_blocks * fast - unread
    return below + above + scored * head


def decoding_bytes(config: ModelConfig, position: int, itemsize: int) -> float:
    """Read for one token of one sequence after `position` others: every matrix that it meets, and the keys it sees.

    All in numbers of `itemsize` bytes, the fast weights too: a product needs no more of them than that. A mini-batch's
    inner step comes once in M tokens and is left out.
    """
    windows = (config.window_of(block) or position for block in range(config.num_blocks))
    seen = sum(min(window, position) for window in windows)
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.width  # of which a token reads one row
    return itemsize * (config.num_parameters - embedding + 2 * config.kv_width * seen)
