"""The likeliest of all tokens and its log-probability. Order 0.

reference.py   the definition
triton.py      the same by many programs for each row: PyTorch has one
"""

from torch import Tensor

from longread.ops.fusible import fusible
from longread.ops.likeliest.reference import reference_likeliest

__all__ = ["likeliest"]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row is largest, and log softmax there.

    Args:
        logits: [B, V], float32 or wider. Of equals the first counts; no number counts as the largest.

    Returns:
        ids, int64 [B], and log-probabilities, [B] of the type of the logits. What a row gives depends on nothing else.
    """
    if fusible(logits) and logits.numel():
        from longread.ops.likeliest.triton import triton_likeliest

        return triton_likeliest(logits)
    return reference_likeliest(logits)
