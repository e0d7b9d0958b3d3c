"""The definition: one token after the other."""

import torch
from torch import Tensor


def reference_ssd(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.ssd.ssd`."""
    found = []
    for q, k, v, a in zip(query.unbind(1), key.unbind(1), value.unbind(1), log_decay.unbind(1), strict=True):
        state = a.exp()[..., None, None] * state + torch.einsum("bj,bnh->bnjh", k, v)
        found.append(torch.einsum("bnjh,bj->bnh", state, q))
    return (torch.stack(found, 1) if found else torch.empty_like(value)), state
