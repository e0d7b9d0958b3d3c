"""Negative log-likelihood of each token from the last hidden state, without keeping a float32 [tokens, V] tensor.

reference.py   all logits at once; any order of derivative
chunked.py     vocabulary in chunks, logits made again when a derivative is taken; order 2
triton.py      tokens in chunks, logits in the type of the products, few passes over them; order 2
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.attention.reference import capped
from longread.ops.cross_entropy.chunked import chunked_cross_entropy
from longread.ops.fusible import fusible

__all__ = ["SharedHead", "capped", "cross_entropy"]


class SharedHead:
    """A head [V, D] in the type of the products, for many calls in one graph: each adds to the one gradient of it."""

    def __init__(self, head: Tensor, dtype: torch.dtype) -> None:
        self.total: list[Tensor] = []
        """The gradient so far, if there is one; [V, D] of the type of the products."""
        self.weight: Tensor = _ShareHead.apply(head, dtype, self.total)


class _ShareHead(torch.autograd.Function):
    """The cast. All calls are differentiated before this is, and hand it their gradients, or leave them in `total`."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, dtype: torch.dtype, total: list[Tensor]) -> Tensor:
        ctx.total, ctx.dtype = total, head.dtype
        ctx.set_materialize_grads(False)
        return head.to(dtype) if head.dtype != dtype else head.view_as(head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, handed: Tensor | None) -> tuple[Tensor | None, None, None]:
        parts = [*ctx.total, *([] if handed is None else [handed])]
        ctx.total.clear()
        return (sum(parts[1:], parts[0]).to(ctx.dtype) if parts else None), None, None


def cross_entropy(hidden: Tensor, head: Tensor | SharedHead, targets: Tensor, soft_cap: float | None = None) -> Tensor:
    """−log softmax(hidden · headᵀ)[target], at any order of derivative up to 2.

    Args:
        hidden: [..., D]; its type is the type of the products.
        head: [V, D], or one that is shared.
        targets: int64 [...], each in [0, V).
        soft_cap: c, where logits z count as c tanh(z / c) (Gemma 2, arXiv 2408.00118). No kernel does that.

    Returns:
        [...], float32 (float64 for float64 input).
    """
    weight, total = (head.weight, head.total) if isinstance(head, SharedHead) else (head, None)
    if soft_cap is None and fusible(hidden, weight):
        from longread.ops.cross_entropy.triton import triton_cross_entropy

        return triton_cross_entropy(hidden, weight, targets, total)
    return chunked_cross_entropy(hidden, weight, targets, soft_cap)
