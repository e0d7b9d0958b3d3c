"""Attention of one new token a sequence over a ring of keys and values: decoding.

The ring of R slots holds token p in slot p mod R, so that a new token takes the place of the oldest and nothing moves.
Keys carry their position already (rotary), so the order of the slots does not matter.

In plain PyTorch below; ring_triton.py is its twin for NVIDIA GPUs. Order 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.fusible import fusible

LARGEST_HEAD_DIM = 256
"""Of the kernel."""


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: tuple[Tensor, Tensor],
    position: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """Writes each sequence's new token into its ring and lets it see the `window` tokens that end with it.

    Args:
        query, key, value: [B, N, 1, H], of the new tokens.
        ring: keys and values [B, N, R, H], contiguous; changed in place. R is at least the window.
        position: of the new tokens, int64 [B]; each ring holds the tokens before it that it still has.
        window: number of visible tokens, the new one included; None: all, of which there may be at most R.

    Returns:
        [B, N, 1, H].
    """
    if fusible(query, key, value, *ring) and query.shape[-1] <= LARGEST_HEAD_DIM:
        from longread.ops.attention.ring_triton import triton_ring_attention

        return triton_ring_attention(query, key, value, ring, position, window=window)
    return plain_ring_attention(query, key, value, ring, position, window=window)


def plain_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: tuple[Tensor, Tensor],
    position: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """The same in PyTorch, in any type."""
    B, N, R, H = ring[0].shape
    slot = torch.arange(R, device=position.device)
    here = position.remainder(R)
    for place, new in zip(ring, (key, value), strict=True):
        place.scatter_(2, here.view(B, 1, 1, 1).expand(B, N, 1, H), new)
    age = (here[:, None] - slot).remainder(R)
    visible = age <= position[:, None] if window is None else age < (position[:, None] + 1).clamp(max=window)
    return F.scaled_dot_product_attention(query, *ring, attn_mask=visible[:, None, None])
