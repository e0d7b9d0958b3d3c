"""Root-mean-square normalisation (arXiv 1910.07467), at any order of derivative up to 2.

reference.py   the definition
explicit.py    the same with its first and second derivative written out: fewer, larger passes
triton.py      the same, each derivative one pass; with what stands around the norms of a block in the same pass
shared.py      a gain that many norms of one graph share
"""

from typing import NamedTuple

from torch import Tensor

from longread.ops.fusible import fusible
from longread.ops.rms_norm.explicit import explicit_rms_norm
from longread.ops.rms_norm.shared import SharedGain, shared_gain

__all__ = ["WIDEST", "Gain", "SharedGain", "rms_norm", "rms_norm_and_input", "shared_gain"]

WIDEST = 16_384
"""Longest row that one program holds."""


class Gain(NamedTuple):
    """What an RMS norm knows."""

    weight: Tensor
    """[D]"""
    eps: float


def rms_norm(
    x: Tensor,
    gain: Tensor | SharedGain,
    eps: float,
    *,
    residual: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """gain ∘ x / √(mean x² + eps) over the last dimension; then turned, then added to a residual, if these are given.

    Args:
        x: [..., D], any float type; float16 and bfloat16 are normalised in float32.
        gain: [D].
        eps: positive.
        residual: of the shape and type of x, added to the result.
        rotary: unit complex numbers [T, D/2] for x [..., T, D], which rotate the normalised vectors (`ops.rotary`).

    Returns:
        [..., D] of the type of x.
    """
    if _fits(x, gain):
        from longread.ops.rms_norm.triton import triton_rms_norm

        return triton_rms_norm(x, gain, eps, residual=residual, rotary=rotary)
    return explicit_rms_norm(x, _weight(gain), eps, residual=residual, rotary=rotary)


def rms_norm_and_input(x: Tensor, gain: Tensor | SharedGain, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, and x for who uses it beside the norm too: the sum of both gradients is no pass of its own then.

    Args as in `rms_norm`.
    """
    if _fits(x, gain):
        from longread.ops.rms_norm.triton import triton_rms_norm_and_input

        return triton_rms_norm_and_input(x, gain, eps)
    return explicit_rms_norm(x, _weight(gain), eps), x


def _weight(gain: Tensor | SharedGain) -> Tensor:
    return gain.weight if isinstance(gain, SharedGain) else gain


def _fits(x: Tensor, gain: Tensor | SharedGain) -> bool:
    return fusible(x, _weight(gain)) and x.shape[-1] <= WIDEST
