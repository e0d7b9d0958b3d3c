"""The gate of SwiGLU (arXiv 2002.05202), silu(a) ∘ b, at any order of derivative up to 2.

reference.py   the definition
explicit.py    the same with its first and second derivative written out
triton.py      the same, each derivative one pass
"""

from torch import Tensor

from longread.ops.fusible import fusible
from longread.ops.swiglu.explicit import explicit_swiglu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up, elementwise; both [..., F], and so is the result."""
    if fusible(gate, up):
        from longread.ops.swiglu.triton import triton_swiglu

        return triton_swiglu(gate, up)
    return explicit_swiglu(gate, up)
