"""Causal attention over a window, with a cached past: the contract, and which implementation answers.

Heads may share keys and values (grouped-query attention, arXiv 2305.13245): of N heads of queries, N / G neighbours
look at one of the G heads of keys and values, query head n at n // (N / G). No implementation lays keys and values
out N times.

reference.py   every score in one matrix; any order of derivative; the twin that defines the result
banded.py      blocks of queries over their band of keys, by PyTorch's fused kernels; order 1; memory O(T)
inner.py       one mini-batch over a past without a gradient, on one thread of a CPU; order 1
triton.py      kernels of our own for NVIDIA GPUs; order 2; memory O(T)
overlapped.py  its forward pass once more, for Hopper GPUs and normed queries and keys; hopper.py says when
further.py     also over a few older tokens, each query told which; order 1; memory T × all keys
ring.py        one new token a sequence over a ring of keys, for decoding: a contract of its own
"""

import torch
from torch import Tensor

from longread.ops.attention.banded import banded_attention
from longread.ops.attention.further import Further, further_attention
from longread.ops.attention.hopper import overlaps
from longread.ops.attention.inner import inner_attention, pays
from longread.ops.attention.reference import check_heads, reference_attention
from longread.ops.fusible import fusible

__all__ = ["KEPT_OPERATIONS", "LARGEST_HEAD_DIM", "Further", "attention"]

LARGEST_HEAD_DIM = 128
"""Of the kernels. Larger heads are answered as on a CPU: at order 2 by the reference, with its memory."""
FEWEST_ROWS = 1 << 14
"""Queries of all heads and sequences, without a past, from which on PyTorch's kernels answer at order 0 and 1. They are
faster on fewer too, 0.2 to 1 ms forward and back instead of 1.4 to 2.1 (one H200), but a process that reads a text
would begin cuDNN for its first mini-batch alone, 0.1 to 0.2 s."""
KEPT_OPERATIONS = frozenset(
    (
        "longread::attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    )
)
"""Names of the operations behind it at order 1. Their results are small beside the work of having them again."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None,
    order: int,
    gains: tuple[Tensor, Tensor] | None = None,
    soft_cap: float | None = None,
    further: Further | None = None,
) -> Tensor:
    """softmax(q kᵀ / √H) v, where each query sees the `window` tokens that end with its own.

    Args:
        query: [B, N, T, H].
        key, value: [B, G, T, H], of the same tokens; G divides N.
        past: keys and values of older tokens, each [B, G, P, H] with any P, oldest first. They are apart because the
            inner gradient takes them for constants.
        window: number of visible tokens, the query's own included; None: all.
        order: highest order of derivative that will be taken, 0, 1 or 2. A result asked for with order 1 must
            not be differentiated twice: fused kernels would be silently wrong.
        gains: [H] of query and key, where `rms_norm` has made both (the past's keys too) and at most turned them
            since. They change nothing in the result: kernels that know how large a score can be are faster.
        soft_cap: c, where a score s = q kᵀ / √H enters the softmax as c tanh(s / c) (Gemma 2, arXiv 2408.00118). The
            reference answers then, at every order: memory T × (P + T).
        further: older tokens that are seen beside the window, at order 0 and 1 and without a soft cap.

    Returns:
        [B, N, T, H].
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order is {order}; it must be 0, 1 or 2")
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(f"{query.shape[-2]} queries for {key.shape[-2]} keys; older keys belong into past")
    check_heads(query, key, value, *(past or ()))
    if further is not None:
        if order == 2 or soft_cap is not None:
            raise ValueError("further tokens are seen at order 0 and 1, and without a soft cap")
        return further_attention(query, key, value, past=past, window=window, further=further)
    if soft_cap is not None:
        return reference_attention(query, key, value, past=past, window=window, soft_cap=soft_cap)
    T = query.shape[-2]
    dense = (past is None or past[0].shape[-2] == 0) and (window is None or window >= T)
    dense = dense and query.shape[:-1].numel() >= FEWEST_ROWS
    fits = query.numel() > 0 and query.shape[-1] <= LARGEST_HEAD_DIM
    fits = fits and fusible(query, key, value, *(past or ()))
    if fits and not (dense and order < 2 and _pytorch_is_faster(query, key, value, gains)):
        from longread.ops.attention.triton import triton_attention

        return triton_attention(query, key, value, past=past, window=window, gains=gains)
    if past is not None and order == 1 and pays(query, past, window):
        return inner_attention(query, key, value, past=past, window=window)
    implementation = reference_attention if order == 2 else banded_attention
    return implementation(query, key, value, past=past, window=window)


def _pytorch_is_faster(query: Tensor, key: Tensor, value: Tensor, gains: tuple[Tensor, Tensor] | None) -> bool:
    """Where neither a window nor a past hides a key: with a derivative, and where no forward pass overlaps."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return learns or gains is None or not overlaps(query, key, gains[0])
