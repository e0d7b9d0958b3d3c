"""Products of one vector a sequence with matrices: decoding, where the time is that of reading the matrices.

What stands between two products of a residual block is done on the way: the norm after a sub-layer, its addition to the
stream, the norm before the next, and the gate of an MLP. Order 0.

reference.py   norms, products and gate one after the other, each as the other ops answer it
triton.py      one kernel for all of it, where every matrix meets one vector
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longread.ops.fusible import fusible
from longread.ops.gemv.reference import Stream, reference_entered, reference_gemv
from longread.ops.rms_norm import Gain
from longread.ops.swiglu import Activation

__all__ = ["Stream", "entered", "gemv"]

WIDEST = 16_384
"""Longest vector that one program holds."""


def entered(
    stream: Stream,
    weights: Sequence[Tensor],
    *,
    gain: Gain | None = None,
    biases: Sequence[Tensor] | None = None,
    gate: Activation | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The stream, and its products with the first matrices of the next sub-layer.

    Args:
        weights: one to three matrices, each [O, D], or [B, O, D] of each sequence; of one O where there is a gate.
        gain: of the norm that the products' input goes through.
        biases: [O] for each of the weights.
        gate: s, as `longread.ops.swiglu.swiglu` names it: s(first product) ∘ second takes the place of both.

    Returns:
        the stream with all added, [B, D], and the products, each [B, O].
    """
    if _fits(stream.x, weights):
        from longread.ops.gemv.triton import triton_entered

        return triton_entered(stream, weights, gain=gain, biases=biases, gate=gate)
    return reference_entered(stream, weights, gain=gain, biases=biases, gate=gate)


def gemv(x: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """x Wᵀ.

    Args:
        x: [B, D].
        weight: [O, D], or [B, O, D] of each sequence.
        dtype: of the result; None: that of x.

    Returns:
        [B, O].
    """
    if _fits(x, (weight,)):
        from longread.ops.gemv.triton import triton_gemv

        return triton_gemv(x, weight, dtype=dtype)
    return reference_gemv(x, weight, dtype=dtype)


def _fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether each matrix, laid out row after row, meets one vector only. With several, tensor cores are faster."""
    alone = all((len(x) == 1 or w.dim() == 3) and w[..., 0, :].stride(-1) == 1 for w in weights)
    dense = all(w.stride(-2) == w.shape[-1] for w in weights)
    return alone and dense and x.numel() > 0 and x.shape[-1] <= WIDEST and fusible(x, *weights)
