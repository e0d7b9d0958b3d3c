"""The rotary embedding of positions (arXiv 2104.09864), at any order of derivative.

frequencies.py   radians a token, also of contexts that were stretched
reference.py     the definition
triton.py        one pass over memory; a rotation is linear, so its derivative is the rotation back
"""

from torch import Tensor

from longread.ops.fusible import fusible
from longread.ops.rotary.frequencies import Scaling, frequencies, yarn_attention_factor
from longread.ops.rotary.reference import reference_rotate, rotation

__all__ = ["Scaling", "frequencies", "rotate", "rotation", "yarn_attention_factor"]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates each pair (x[2i], x[2i+1]) by its angle.

    Args:
        x: [..., T, H], any float type; float16 and bfloat16 are turned in float32.
        rotary: unit complex numbers [T, H/2] or [B, 1, T, H/2] from `rotation`; they take no gradient.

    Returns:
        [..., T, H] of the type of x.
    """
    if fusible(x):
        from longread.ops.rotary.triton import triton_rotate

        return triton_rotate(x, rotary)
    return reference_rotate(x, rotary)
