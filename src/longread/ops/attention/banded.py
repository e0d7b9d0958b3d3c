"""Windowed causal attention by blocks of queries, each over its band of keys, through PyTorch's fused kernels.

A block of queries needs only its own keys and those of the few blocks before it, so all blocks become one batch of
small dense problems: work and memory are linear in the number of tokens. Differentiable once.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.attention.reference import folded, visible, with_past

LARGEST_BLOCK = 256
"""Queries in a block; larger ones waste less on overlapping bands, smaller ones less on masked corners."""
LARGEST_GROUPED_HEAD_DIM = 256
"""Of PyTorch's flash kernels for CUDA devices, the ones that share keys and values."""


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, *, past: tuple[Tensor, Tensor] | None = None, window: int | None
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at order 1."""
    key, value = with_past(key, value, past)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if window is None or window >= num_keys:
        if num_queries == num_keys:
            return attend(query, key, value, is_causal=num_keys > 1)
        mask = visible(num_queries, num_keys, None, query.device) if num_queries > 1 else None
        return attend(query, key, value, mask)

    block = min(LARGEST_BLOCK, max(16, window // 2))
    if num_queries <= block:
        recent = min(num_keys, window - 1 + num_queries)
        mask = _band(num_queries, recent, window, query) if num_queries > 1 else None
        return attend(query, key[..., -recent:, :], value[..., -recent:, :], mask)

    # Blocks are laid so that the first query opens one; keys before the first token and after the last are zeros.
    num_blocks, blocks_back = -(-num_queries // block), -(-(window - 1) // block)
    older, reach = num_keys - num_queries, blocks_back * block
    absent, missing = max(0, reach - older), num_blocks * block - num_queries

    def bands(x: Tensor) -> Tensor:
        """[blocks, B · G, reach + block, H]: each block of tokens after those before it."""
        padded = F.pad(x[..., max(0, older - reach) :, :], (0, 0, absent, missing)).unflatten(-2, (-1, block))
        return _blocks_first(torch.cat([padded[:, :, i : i + num_blocks] for i in range(blocks_back + 1)], dim=-2))

    blocks = _blocks_first(F.pad(query, (0, 0, 0, missing)).unflatten(-2, (num_blocks, block)))

    if not absent:
        mask = _band(block, reach + block, window, query)
    else:
        mask = visible(block, reach + block, window, query.device)
        first_key = torch.arange(num_blocks, device=query.device)[:, None] * block
        exists = first_key + torch.arange(reach + block, device=query.device) >= absent  # [blocks, reach + block]
        mask = mask & exists[:, None, None, :]
    out = attend(blocks, bands(key), bands(value), mask)
    B, N = query.shape[:2]
    return out.unflatten(1, (B, N)).permute(1, 2, 0, 3, 4).flatten(2, 3)[..., :num_queries, :]


def _band(num_queries: int, num_keys: int, window: int, query: Tensor) -> Tensor:
    """What `visible` says, as PyTorch's kernel for this query takes it in: on a CPU as numbers to add."""
    if query.is_cpu:
        return added_mask(num_queries, num_keys, window, query.dtype)
    return visible(num_queries, num_keys, window, query.device)


@functools.lru_cache(maxsize=4)
def added_mask(num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What `visible` says, as numbers to add to scores. Kept, since making it takes a good part of the attention of one
    mini-batch. Changed by nobody."""
    with torch.inference_mode(False):
        mask = visible(num_queries, num_keys, window, torch.device("cpu"))
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _blocks_first(x: Tensor) -> Tensor:
    """[B, N, blocks, tokens, H] -> [blocks, B · N, tokens, H]: one mask a block then serves all heads."""
    return x.permute(2, 0, 1, 3, 4).flatten(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """PyTorch's attention of [b, N, Tq, H] over [b, G, Tk, H]; the mask is [Tq, Tk] or [b, 1, Tq, Tk]."""
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    if query.is_cuda and (mask is not None or query.itemsize > 2 or query.shape[-1] > LARGEST_GROUPED_HEAD_DIM):
        return _attend_to_views(query, key, value, mask, is_causal)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=True)


def _attend_to_views(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The same where PyTorch has no kernel that shares: it would write keys and values N times, and every score.

    A mask of its own for each of b problems meets all queries of a group as rows of one head. Otherwise b and G
    become one dimension, so that a view with a stride of 0 repeats keys and values, and no mask.
    """
    b, N, Tq, H = query.shape
    G = key.shape[1]
    if mask is not None and mask.ndim == 4:
        rows = F.scaled_dot_product_attention(folded(query, G), key, value, attn_mask=mask.repeat(1, 1, N // G, 1))
        return rows.unflatten(2, (N // G, Tq)).flatten(1, 2)
    key, value = (x.reshape(b * G, 1, *x.shape[2:]).expand(-1, N // G, -1, -1) for x in (key, value))
    query = query.reshape(b * G, N // G, Tq, H)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal).reshape(b, N, Tq, H)
