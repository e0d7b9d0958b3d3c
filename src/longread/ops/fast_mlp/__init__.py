"""SwiGLU with one set of weights per sequence: the MLP that learns while it reads.

reference.py   batched products around the gate; any order of derivative up to 2
"""

from torch import Tensor

from longread.ops.fast_mlp.reference import reference_fast_mlp


def fast_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down · (silu(gate · x) ∘ (up · x)), sequence by sequence.

    Args:
        x: [B, T, D]; its type is the type of the products.
        gate, up: [B, F, D] and
        down: [B, D, F]: fast weights, float32 or wider.

    Returns:
        [B, T, D] of the type of x.
    """
    return reference_fast_mlp(x, gate, up, down)
