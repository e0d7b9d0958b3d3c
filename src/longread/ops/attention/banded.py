"""Windowed causal attention by blocks of queries, each over its band of keys, through PyTorch's fused kernels.

A block of queries needs only its own keys and those of the few blocks before it, so all blocks become one batch of
small dense problems: work and memory are linear in the number of tokens. Differentiable once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.attention.reference import visible, with_past

LARGEST_BLOCK = 256
"""Queries in a block; larger ones waste less on overlapping bands, smaller ones less on masked corners."""


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, *, past: tuple[Tensor, Tensor] | None = None, window: int | None
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at order 1."""
    key, value = with_past(key, value, past)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if window is None or window >= num_keys:
        if num_queries == num_keys:
            return F.scaled_dot_product_attention(query, key, value, is_causal=num_keys > 1)
        mask = visible(num_queries, num_keys, None, query.device) if num_queries > 1 else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    block = min(LARGEST_BLOCK, max(16, window // 2))
    if num_queries <= block:
        recent = min(num_keys, window - 1 + num_queries)
        mask = visible(num_queries, recent, window, query.device)
        return F.scaled_dot_product_attention(query, key[..., -recent:, :], value[..., -recent:, :], attn_mask=mask)

    # Blocks are laid so that the first query opens one; keys before the first token and after the last are zeros.
    num_blocks, blocks_back = -(-num_queries // block), -(-(window - 1) // block)
    older, reach = num_keys - num_queries, blocks_back * block
    absent, missing = max(0, reach - older), num_blocks * block - num_queries

    def bands(x: Tensor) -> Tensor:
        """[blocks, B · N, reach + block, H]: each block of tokens after those before it."""
        padded = F.pad(x[..., max(0, older - reach) :, :], (0, 0, absent, missing)).unflatten(-2, (-1, block))
        return _blocks_first(torch.cat([padded[:, :, i : i + num_blocks] for i in range(blocks_back + 1)], dim=-2))

    blocks = _blocks_first(F.pad(query, (0, 0, 0, missing)).unflatten(-2, (num_blocks, block)))

    mask = visible(block, reach + block, window, query.device)
    if absent:
        first_key = torch.arange(num_blocks, device=query.device)[:, None] * block
        exists = first_key + torch.arange(reach + block, device=query.device) >= absent  # [blocks, reach + block]
        mask = mask & exists[:, None, None, :]
    out = F.scaled_dot_product_attention(blocks, bands(key), bands(value), attn_mask=mask)
    B, N = query.shape[:2]
    return out.unflatten(1, (B, N)).permute(1, 2, 0, 3, 4).flatten(2, 3)[..., :num_queries, :]


def _blocks_first(x: Tensor) -> Tensor:
    """[B, N, blocks, tokens, H] -> [blocks, B · N, tokens, H]: one mask a block then serves all heads."""
    return x.permute(2, 0, 1, 3, 4).flatten(1, 2)
