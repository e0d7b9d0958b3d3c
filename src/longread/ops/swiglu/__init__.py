"""The gate of a gated linear unit (arXiv 2002.05202), s(a) ∘ b, at any order of derivative up to 2.

It is SwiGLU's, with s = silu, unless GEGLU's is asked for, with s = GELU.

reference.py   the definition
explicit.py    the same with its first and second derivative written out
triton.py      the same, each derivative one pass
"""

from torch import Tensor

from longread.ops.fusible import fusible
from longread.ops.swiglu.explicit import explicit_swiglu
from longread.ops.swiglu.reference import Activation

__all__ = ["Activation", "swiglu", "swiglu_of_halves"]


def swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """s(gate) ∘ up, elementwise; both [..., F], and so is the result.

    Args:
        activation: s. "silu" is aσ(a); "gelu_tanh" is GELU by its approximation with tanh (arXiv 1606.08415).
    """
    if fusible(gate, up):
        from longread.ops.swiglu.triton import triton_swiglu

        return triton_swiglu(gate, up, activation)
    return explicit_swiglu(gate, up, activation)


def swiglu_of_halves(both: Tensor, activation: Activation = "silu") -> Tensor:
    """The same of one tensor [..., 2F], which holds the gate and then what it gates: [..., F]."""
    if fusible(both):
        from longread.ops.swiglu.triton import triton_swiglu_of_halves

        return triton_swiglu_of_halves(both, activation)
    gate, up = both.chunk(2, dim=-1)
    return explicit_swiglu(gate, up, activation)
