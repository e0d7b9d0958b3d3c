"""The gate of SwiGLU (arXiv 2002.05202), silu(a) ∘ b, at any order of derivative up to 2.

reference.py   the definition
explicit.py    the same with its first and second derivative written out
"""

from torch import Tensor

from longread.ops.swiglu.explicit import explicit_swiglu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up, elementwise; both [..., F], and so is the result."""
    return explicit_swiglu(gate, up)
