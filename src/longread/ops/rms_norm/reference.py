"""RMSNorm as its definition says."""

import torch
from torch import Tensor

from longread.ops.rotary.reference import reference_rotate


def reference_rms_norm(
    x: Tensor, gain: Tensor, eps: float, *, residual: Tensor | None = None, rotary: Tensor | None = None
) -> Tensor:
    """The contract of `longread.ops.rms_norm.rms_norm`, left to autograd at every order."""
    wide = x if x.dtype == torch.float64 else x.float()
    out = (gain.to(wide.dtype) * wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    if rotary is not None:
        out = reference_rotate(out, rotary)
    return out if residual is None else residual + out
