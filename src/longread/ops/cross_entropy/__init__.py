"""Negative log-likelihood of each token from the last hidden state, without keeping a float32 [tokens, V] tensor.

reference.py   all logits at once; any order of derivative
chunked.py     vocabulary in chunks, logits made again when a derivative is taken; order 2
triton.py      tokens in chunks, logits in the type of the products, few passes over them; order 2
"""

from torch import Tensor

from longread.ops.attention.reference import capped
from longread.ops.cross_entropy.chunked import chunked_cross_entropy
from longread.ops.fusible import fusible

__all__ = ["capped", "cross_entropy"]


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, soft_cap: float | None = None) -> Tensor:
    """−log softmax(hidden · headᵀ)[target], at any order of derivative up to 2.

    Args:
        hidden: [..., D]; its type is the type of the products.
        head: [V, D].
        targets: int64 [...], each in [0, V).
        soft_cap: c, where logits z count as c tanh(z / c) (Gemma 2, arXiv 2408.00118). No kernel does that.

    Returns:
        [...], float32 (float64 for float64 input).
    """
    if soft_cap is None and fusible(hidden, head):
        from longread.ops.cross_entropy.triton import triton_cross_entropy

        return triton_cross_entropy(hidden, head, targets)
    return chunked_cross_entropy(hidden, head, targets, soft_cap)
