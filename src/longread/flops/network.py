"""Operations of a network's parts, of reading, and bytes of writing.

One forward of a token, with v keys visible on average:

    attention of a block      4 D (N + G) H + 4 N H v    projections; scores and mixing; G heads of keys and values
    an MLP                    6 D F
    head                      2 D V

and in units of that:

    reading, frozen           1
    reading, learning         1 below the lowest fast MLP; above it 2, and 1 more for the weight gradient of each fast
                              MLP, and for the keys and values of the mini-batch itself; nothing for the gradient of the
                              lowest one's input, which nobody asks for
"""

from __future__ import annotations

from longread.config import ModelConfig


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
    beyond = max(0, tokens - config.window_size) if config.kept_tokens else 0
    kept = visible_keys(beyond, config.kept_tokens) * beyond / tokens if beyond else 0.0
    return 4 * config.num_heads * config.head_dim * (visible_keys(tokens, config.window_of(block)) + kept)


def mlp_flops(config: ModelConfig, *, fast: bool = False) -> float:
    """Of one token in one MLP, a static or a fast one."""
    return 6 * config.width * (config.fast_mlp_hidden if fast else config.mlp_hidden)


def head_flops(config: ModelConfig) -> float:
    """Of the logits of one token."""
    return 2 * config.width * config.vocab_size


def lower_attentions(config: ModelConfig) -> range:
    """Blocks whose attention is in `Transformer.lower`: those of the prefix, and the first of the suffix."""
    return range(min(config.num_prefix_blocks + 1, config.num_blocks))


def upper_attentions(config: ModelConfig) -> range:
    """Blocks whose attention is in `Transformer.upper`."""
    return range(config.num_prefix_blocks + 1, config.num_blocks)


def lower_flops(config: ModelConfig, tokens: int) -> float:
    """Of one token in `Transformer.lower`: the prefix, and the attention of the first suffix block."""
    attentions = sum(attention_flops(config, i, tokens) for i in lower_attentions(config))
    return attentions + config.num_prefix_blocks * mlp_flops(config)  # static ones


def upper_flops(config: ModelConfig, tokens: int) -> float:
    """Of one token in `Transformer.upper`: two MLPs in each suffix block, and the other attentions."""
    mlps = config.num_suffix_blocks * (mlp_flops(config) + mlp_flops(config, fast=True))
    return sum(attention_flops(config, i, tokens) for i in upper_attentions(config)) + mlps


def reading_flops(config: ModelConfig, tokens: int, *, scored: bool = True) -> float:
    """Of one token of a text of `tokens`, learning if there are fast weights; unscored, it has no logits."""
    below, above, head = lower_flops(config, tokens), upper_flops(config, tokens), head_flops(config)
    if config.num_suffix_blocks:
        fast = mlp_flops(config, fast=True)
        unread = 2 / 3 * fast  # what the gradient of the lowest fast MLP's input would take
        own = sum(score_flops(config, i, config.mini_batch_size) for i in upper_attentions(config))
        return below + 2 * (above + head) + own + config.num_suffix_blocks * fast - unread
    return below + above + scored * head


def decoding_bytes(config: ModelConfig, position: int, itemsize: int) -> float:
    """Read for one token of one sequence after `position` others: every matrix that it meets, and the keys it sees.

    All in numbers of `itemsize` bytes, the fast weights too: a product needs no more of them than that. A mini-batch's
    inner step comes once in M tokens and is left out.
    """
    windows = (config.window_of(block) or position for block in range(config.num_blocks))
    seen = sum(min(window, position) for window in windows)
    seen += config.num_blocks * min(config.kept_tokens, max(0, position - config.window_size))
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.width  # of which a token reads one row
    return itemsize * (config.num_parameters - embedding + 2 * config.kv_width * seen)
