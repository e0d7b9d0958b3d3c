"""Attention of one new token a sequence over a ring of keys and values: decoding.

The ring of R slots holds token p in slot p mod R, so that a new token takes the place of the oldest and nothing moves.
Keys carry their position already (rotary), so the order of the slots does not matter.

In plain PyTorch below; ring_triton.py is its twin for NVIDIA GPUs, which norms and turns the new token on its way.
Order 0. The heads of a group are queries of one product over the ring that they share, which is read once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.attention.reference import capped, check_heads, folded
from longread.ops.fusible import fusible
from longread.ops.rms_norm import Gain, rms_norm
from longread.ops.rotary import rotate

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
    soft_cap: float | None = None,
    norms: tuple[Gain, Gain] | None = None,
    rotary: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Writes each sequence's new token into its ring and lets it see the `window` tokens that end with it.

    Args:
        query: [B, N, 1, H], of the new tokens.
        key, value: [B, G, 1, H], of the same; G divides N, and query head n looks at head n // (N / G).
        ring: keys and values [B, G, R, H], contiguous; changed in place. R is at least the window.
        position: of the new tokens, int64 [B]; each ring holds the tokens before it that it still has.
        window: number of visible tokens, the new one included; None: all, of which there may be at most R.
        soft_cap: as in `longread.ops.attention.attention`; plain PyTorch answers then.
        norms: of query and key, which go through them first.
        rotary: unit complex numbers [B, 1, 1, H/2], by which they are turned after that (`longread.ops.rotary`).
        arrivals: zeros of the kernel's own, int32 of B · N numbers at least, which it leaves zeros: calls one after
            the other may share them. None: it makes some.

    Returns:
        [B, N, 1, H].
    """
    check_heads(query, key, value, *ring)
    fits = soft_cap is None and query.shape[-1] <= LARGEST_HEAD_DIM
    if fits and fusible(query, key, value, *ring):
        from longread.ops.attention.ring_triton import triton_ring_attention

        return triton_ring_attention(
            query, key, value, ring, position, window=window, norms=norms, rotary=rotary, arrivals=arrivals
        )
    if norms is not None:
        query, key = (rms_norm(x, *norm, rotary=rotary) for x, norm in zip((query, key), norms, strict=True))
    elif rotary is not None:
        query, key = rotate(query, rotary), rotate(key, rotary)
    return plain_ring_attention(query, key, value, ring, position, window=window, soft_cap=soft_cap)


def plain_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: tuple[Tensor, Tensor],
    position: Tensor,
    *,
    window: int | None,
    soft_cap: float | None = None,
) -> Tensor:
    """The same in PyTorch, in any type."""
    B, G, R, H = ring[0].shape
    slot = torch.arange(R, device=position.device)
    here = position.remainder(R)
    for place, new in zip(ring, (key, value), strict=True):
        place.scatter_(2, here.view(B, 1, 1, 1).expand(B, G, 1, H), new)
    age = (here[:, None] - slot).remainder(R)
    visible = age <= position[:, None] if window is None else age < (position[:, None] + 1).clamp(max=window)
    rows, mask = folded(query, G), visible[:, None, None]  # [B, G, N/G, H], [B, 1, 1, R]
    if soft_cap is None:
        out = F.scaled_dot_product_attention(rows, *ring, attn_mask=mask)
    else:
        scores = capped(rows @ ring[0].transpose(-1, -2) * H**-0.5, soft_cap)
        out = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ ring[1]
    return out.flatten(1, 2).unsqueeze(2)
