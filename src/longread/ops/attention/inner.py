"""Attention of one mini-batch over a past that takes no gradient, on a CPU: that of an inner step of reading.

PyTorch's fused kernel makes the gradients of all keys and values, and the weights once more for them. Of these an
inner step wants those of its own tokens, a small part. Here the weights w = softmax(s) are kept, and with the
cotangent dy of y = w v and scores s = q kᵀ / √H

    ds = w∘(dy vᵀ − ⟨dy, y⟩)        dq = ds k / √H        dk = dsᵀ q / √H        dv = wᵀ dy

the last two only over the own tokens. Differentiable once; memory N × T × (P + T).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.attention.banded import added_mask
from longread.ops.attention.reference import folded

MOST_WEIGHTS = 2**22
"""That are kept, of all sequences and heads; with more, memory is worth more than time."""


def pays(query: Tensor, past: tuple[Tensor, Tensor], window: int | None) -> bool:
    """Whether the past is such a one, the weights are few enough, and there is one thread: several would share the
    fused kernel, which is one operation, better than these many."""
    if not (query.is_cpu and query.itemsize >= 4 and query.requires_grad and torch.is_grad_enabled()):
        return False
    B, N, T, _ = query.shape
    older = _seen(past[0].shape[-2], window)
    few = B * N * T * (older + T) <= MOST_WEIGHTS and torch.get_num_threads() == 1
    return few and 0 < T <= older and not any(x.requires_grad for x in past)


def inner_attention(
    query: Tensor, key: Tensor, value: Tensor, *, past: tuple[Tensor, Tensor], window: int | None
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at order 1, but for gradients of the past."""
    T, older = query.shape[-2], _seen(past[0].shape[-2], window)
    mask = added_mask(T, older + T, window, query.dtype)
    return _Attention.apply(query, key, value, *(x[..., x.shape[-2] - older :, :] for x in past), mask)


def _seen(older: int, window: int | None) -> int:
    """How many tokens of the past any query sees."""
    return older if window is None else min(older, window - 1)


class _Attention(torch.autograd.Function):
    """Head by head: the scores of one stay in the cache of a core."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor
    ) -> Tensor:
        G, (N, T, H) = key.shape[1], query.shape[1:]
        queries, keys, values = (
            x.contiguous().flatten(0, 1)
            for x in (folded(query, G), torch.cat((past_key, key), -2), torch.cat((past_value, value), -2))
        )
        mask = mask.repeat(N // G, 1) if N > G else mask
        weights = query.new_empty(len(queries), *mask.shape)
        out = torch.empty_like(queries)
        for q, k, v, w, y in zip(queries, keys, values, weights, out, strict=True):
            torch.softmax(torch.addmm(mask, q, k.t(), alpha=H**-0.5), -1, out=w)
            torch.mm(w, v, out=y)
        ctx.save_for_backward(queries, keys, values, weights, out)
        ctx.num_own, ctx.sizes = T, ((-1, G), (N // G, T))
        return _unfolded(out, ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights, out = ctx.saved_tensors
        (_, G), _ = ctx.sizes
        T, scale = ctx.num_own, queries.shape[-1] ** -0.5
        dout = folded(dout, G).contiguous().flatten(0, 1)
        dots = torch.linalg.vecdot(dout, out).unsqueeze(-1)
        dqueries = torch.empty_like(queries)
        dkeys, dvalues = (torch.empty_like(x[:, :T]) for x in (keys, values))
        for i, (q, k, v, w, dy) in enumerate(zip(queries, keys, values, weights, dout, strict=True)):
            ds = torch.mm(dy, v.t()).sub_(dots[i]).mul_(w)
            torch.mm(ds, k, out=dqueries[i])
            torch.mm(ds[:, -T:].t(), q, out=dkeys[i])
            torch.mm(w[:, -T:].t(), dy, out=dvalues[i])
        dkey, dvalue = (x.unflatten(0, (-1, G)) for x in (dkeys.mul_(scale), dvalues))
        return _unfolded(dqueries.mul_(scale), ctx.sizes), dkey, dvalue, None, None, None


def _unfolded(x: Tensor, sizes: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """[B · G, N/G · T, H] -> [B, N, T, H], the inverse of `folded`."""
    heads, rows = sizes
    return x.unflatten(1, rows).unflatten(0, heads).flatten(1, 2)
