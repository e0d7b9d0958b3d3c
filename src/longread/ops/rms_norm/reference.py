"""RMSNorm as its definition says."""

import torch
from torch import Tensor


def reference_rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The contract of `longread.ops.rms_norm.rms_norm`, left to autograd at every order."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (gain.to(wide.dtype) * wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
