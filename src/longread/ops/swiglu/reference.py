"""SwiGLU's gate as its definition says."""

from torch import Tensor
from torch.nn import functional as F


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The contract of `longread.ops.swiglu.swiglu`, left to autograd at every order."""
    return F.silu(gate) * up
