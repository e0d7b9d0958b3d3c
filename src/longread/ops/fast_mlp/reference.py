"""The per-sequence MLP as batched matrix products."""

from torch import Tensor

from longread.ops.swiglu import Activation, swiglu


def reference_fast_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.fast_mlp.fast_mlp`; the products are left to autograd."""
    gate, up, down = (w.to(x.dtype).transpose(-1, -2) for w in (gate, up, down))
    return swiglu(x @ gate, x @ up, activation) @ down
