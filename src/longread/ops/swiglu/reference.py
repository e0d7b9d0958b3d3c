"""The gate as its definition says."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu_tanh"]


def reference_swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.swiglu.swiglu`, left to autograd at every order."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
