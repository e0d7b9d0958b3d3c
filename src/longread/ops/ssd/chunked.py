"""Chunks of tokens as products; only the state goes from one chunk to the next.

Within a chunk, with g the sum of a up to and with a token and S the state before it:

    o_i = exp(g_i) Sᵀ q_i + Σ_{j<=i} exp(g_i − g_j) (q_i·k_j) v_j

What all its tokens write, decayed to its end, W_c, is known without S. So the states are a sum of the same kind over
chunks, and are made in groups of chunks, as products again: S_c = exp(G_c) S_group + Σ_{m<=c} exp(G_c − G_m) W_m.
"""

import torch
from torch import Tensor

from longread.ops.chunks import cut, decays

CHUNK = 64
GROUP = 64
"""Chunks whose states are made together."""


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
    before, state = states(written, total[..., -1], state)
    outside = ((q[:, :, None] * from_before[..., None]) @ before).transpose(2, 3)
    out = (inside + outside).flatten(1, 2)[:, :T]
    return out.to(value.dtype), state


def states(written: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B, chunks, N, J, H] and after the last, given what each writes and its decay."""
    chunks = written.shape[1]
    size = min(GROUP, chunks)
    w, a = cut(written, size), cut(log_decay, size)
    total, between = decays(a)  # [B, groups, N, size], [B, groups, N, size, size]
    after = torch.einsum("bgnim,bgmnjh->bginjh", between, w)
    begun, before = total.exp().mT[..., None, None], []
    for own, share in zip(after.unbind(1), begun.unbind(1), strict=True):
        every = own + share * state[:, None]
        before += [state[:, None], every[:, :-1]]
        state = every[:, -1]
    return torch.cat(before, 1)[:, :chunks], state
