"""Chunks of tokens as products; only the state goes from one chunk to the next.

Within a chunk, with g the sum of a up to and with a token:

    o_i = exp(g_i) Sᵀ q_i + Σ_{j<=i} exp(g_i − g_j) (q_i·k_j) v_j
"""

import torch
from torch import Tensor

from longread.ops.chunks import cut, decays

CHUNK = 64


def chunked_ssd(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.ssd.ssd`."""
    T = value.shape[1]
    if not T:
        return torch.empty_like(value), state
    size, wide = min(CHUNK, T), state.dtype
    q, k, v, a = (cut(x.to(wide), size) for x in (query, key, value, log_decay))  # [B, chunks, size, ...]
    total, between = decays(a)  # [B, chunks, N, size], [B, chunks, N, size, size]
    scores = torch.einsum("bcij,bcmj->bcim", q, k)[:, :, None] * between
    inside = torch.einsum("bcnim,bcmnh->bcinh", scores, v)
    from_before = total.exp()
    to_after = (total[..., -1:] - total).exp()
    written = torch.einsum("bcmj,bcnm,bcmnh->bcnjh", k, to_after, v)
    outside = []
    for c in range(v.shape[1]):
        outside.append(torch.einsum("bij,bni,bnjh->binh", q[:, c], from_before[:, c], state))
        state = from_before[:, c, :, -1, None, None] * state + written[:, c]
    out = (inside + torch.stack(outside, 1)).flatten(1, 2)[:, :T]
    return out.to(value.dtype), state
