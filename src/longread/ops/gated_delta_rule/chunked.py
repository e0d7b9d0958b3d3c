"""Chunks of tokens as products (arXiv 2412.06464, section 3.3).

Let u_i be what token i writes, S_i = S' + k_i u_iᵀ, and g the sum of a up to and with a token. Within a chunk

    u_i = β_i (v_i − exp(g_i) Sᵀ k_i − Σ_{j<i} exp(g_i − g_j) (k_i·k_j) u_j)

which is a triangular system, (I + A) u = β v − β exp(g) k S. Its solution is linear in the state S before the chunk, so
all chunks are solved at once, for both terms. So is the state after it, S ← M S + N: one product for each chunk, and
everything else is done for all chunks together.
"""

import torch
from torch import Tensor

from longread.ops.chunks import cut, decays

CHUNK = 64


def chunked_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.gated_delta_rule.gated_delta_rule`."""
    T, H = value.shape[1], value.shape[-1]
    if not T:
        return torch.empty_like(value), state
    size, wide = min(CHUNK, T), state.dtype
    q, k, v, b, a = (cut(x.to(wide), size) for x in (query, key, value, beta, log_decay))
    total, between = decays(a)  # [B, chunks, N, size], [B, chunks, N, size, size]
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # [B, chunks, N, size, J or H]
    b = b.transpose(2, 3).unsqueeze(-1)
    from_before = total.exp().unsqueeze(-1)
    system = (b * (k @ k.mT) * between).tril(-1)  # the solver takes the diagonal for 1
    right = torch.cat((b * v, b * from_before * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, erased = solved.split((H, k.shape[-1]), dim=-1)
    scores = (q @ k.mT) * between
    asked = from_before * q
    kept = (total[..., -1:] - total).exp().unsqueeze(-1) * k
    decayed = from_before[:, :, :, -1:] * torch.eye(k.shape[-1], device=k.device, dtype=wide)
    moving, adding = decayed - kept.mT @ erased, kept.mT @ written
    states = [state]
    for move, add in zip(moving.unbind(1), adding.unbind(1), strict=True):  # the gradient of x[:, c] is as large as x
        states.append(add + move @ states[-1])
    before = torch.stack(states[:-1], 1)
    out = asked @ before + scores @ (written - erased @ before)
    out = out.transpose(2, 3).flatten(1, 2)[:, :T]
    return out.to(value.dtype), states[-1]
