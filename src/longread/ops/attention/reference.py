"""Windowed causal attention, written out. Differentiable any number of times; memory Tq × Tk."""

import torch
from torch import Tensor


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which key each query sees, bool [Tq, Tk]; the last query and the last key are the same token."""
    age = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(num_keys, device=device)
    return age >= 0 if window is None else (age >= 0) & (age < window)


def reference_attention(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at any order of derivative."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    mask = visible(query.shape[-2], key.shape[-2], window, query.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value
