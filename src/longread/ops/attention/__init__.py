"""Causal attention over a window, with a cached past: the contract, and which implementation answers.

reference.py   every score in one matrix; any order of derivative; the twin that defines the result
banded.py      blocks of queries over their band of keys; order 1; memory linear in the length
"""

from torch import Tensor

from longread.ops.attention.banded import banded_attention
from longread.ops.attention.reference import reference_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None,
    order: int,
) -> Tensor:
    """softmax(q kᵀ / √H) v, where each query sees the `window` tokens that end with its own.

    Args:
        query, key, value: [B, N, T, H], of the same tokens.
        past: keys and values of older tokens, each [B, N, P, H] with any P, oldest first. They are apart because the
            inner gradient takes them for constants.
        window: number of visible tokens, the query's own included; None: all.
        order: highest order of derivative that will be taken, 0, 1 or 2. A result asked for with order 1 must
            not be differentiated twice: fused kernels would be silently wrong.

    Returns:
        [B, N, T, H].
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order is {order}; it must be 0, 1 or 2")
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(f"{query.shape[-2]} queries for {key.shape[-2]} keys; older keys belong into past")
    implementation = reference_attention if order == 2 else banded_attention
    return implementation(query, key, value, past=past, window=window)
