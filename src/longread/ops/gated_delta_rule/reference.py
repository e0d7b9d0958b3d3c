"""The definition: one token after the other."""

import torch
from torch import Tensor


def reference_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.gated_delta_rule.gated_delta_rule`."""
    found = []
    tokens = zip(*(x.unbind(1) for x in (query, key, value, beta, log_decay)), strict=True)
    for q, k, v, b, a in tokens:
        state = a.exp()[..., None, None] * state
        old = torch.einsum("bnjh,bnj->bnh", state, k)
        state = state + torch.einsum("bnj,bnh->bnjh", k, b[..., None] * (v - old))
        found.append(torch.einsum("bnjh,bnj->bnh", state, q))
    return (torch.stack(found, 1) if found else torch.empty_like(value)), state
