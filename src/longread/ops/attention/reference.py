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


def check_heads(query: Tensor, *shared: Tensor) -> None:
    """Refuses keys and values [B, G, ., H] that the heads of a query [B, N, T, H] cannot share: ValueError."""
    N, G = query.shape[1], shared[0].shape[1]
    if any(x.shape[1] != G for x in shared):
        raise ValueError(f"keys and values have {[x.shape[1] for x in shared]} heads; all must have equally many")
    if not G or N % G:
        raise ValueError(f"{N} heads cannot share {G} heads of keys and values; {N} must be a multiple of it")


def folded(query: Tensor, heads: int) -> Tensor:
    """[B, N, T, H] -> [B, G, N/G · T, H]: all queries that look at one head of keys, head after head."""
    return query.unflatten(1, (heads, query.shape[1] // heads)).flatten(2, 3)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None,
    soft_cap: float | None = None,
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at any order of derivative."""
    key, value = with_past(key, value, past)
    N, T, H = query.shape[1:]
    G = key.shape[1]
    scores = (folded(query, G) @ key.transpose(-1, -2) * H**-0.5).unflatten(2, (N // G, T))  # [B, G, N/G, Tq, Tk]
    if soft_cap is not None:
        scores = capped(scores, soft_cap)
    mask = visible(T, key.shape[-2], window, query.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.flatten(2, 3) @ value).unflatten(2, (N // G, T)).flatten(1, 2)


def capped(scores: Tensor, soft_cap: float) -> Tensor:
    """c tanh(s / c): nearly s where s is small beside c, and never beyond it."""
    return torch.tanh(scores / soft_cap) * soft_cap
