"""Windowed causal attention, written out. Differentiable any number of times; memory Tq × Tk."""

import torch
from torch import Tensor


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which key each query sees, bool [Tq, Tk]; the last query and the last key are the same token."""
    age = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(num_keys, device=device)
    return age >= 0 if window is None else (age >= 0) & (age < window)


def with_past(key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """All keys and all values, oldest first."""
    if past is None or past[0].shape[-2] == 0:
        return key, value
    return torch.cat((past[0], key), dim=-2), torch.cat((past[1], value), dim=-2)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, *, past: tuple[Tensor, Tensor] | None = None, window: int | None
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at any order of derivative."""
    key, value = with_past(key, value, past)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    mask = visible(query.shape[-2], key.shape[-2], window, query.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value
