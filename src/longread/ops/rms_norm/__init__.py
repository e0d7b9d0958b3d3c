"""Root-mean-square normalisation (arXiv 1910.07467), at any order of derivative up to 2.

reference.py   the definition
explicit.py    the same with its first and second derivative written out: fewer, larger passes
"""

from torch import Tensor

from longread.ops.rms_norm.explicit import explicit_rms_norm


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain ∘ x / √(mean x² + eps) over the last dimension.

    Args:
        x: [..., D], any float type; float16 and bfloat16 are normalised in float32.
        gain: [D].
        eps: positive.

    Returns:
        [..., D] of the type of x.
    """
    return explicit_rms_norm(x, gain, eps)
