"""Negative log-likelihood of each token from the last hidden state, without keeping a float32 [tokens, V] tensor.

reference.py   all logits at once; any order of derivative
chunked.py     vocabulary in chunks, logits made again when a derivative is taken; order 2
triton.py      tokens in chunks, logits in the type of the products, few passes over them; order 2
"""

from torch import Tensor

from longread.ops.cross_entropy.chunked import chunked_cross_entropy
from longread.ops.fusible import fusible


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(hidden · headᵀ)[target], at any order of derivative up to 2.

    Args:
        hidden: [..., D]; its type is the type of the products.
        head: [V, D].
        targets: int64 [...], each in [0, V).

    Returns:
        [...], float32 (float64 for float64 input).
    """
    if fusible(hidden, head):
        from longread.ops.cross_entropy.triton import triton_cross_entropy

        return triton_cross_entropy(hidden, head, targets)
    return chunked_cross_entropy(hidden, head, targets)
