"""SwiGLU's gate with its derivatives written out.

With σ = sigmoid(a), s = silu(a) = aσ, s' = σ(1 + a(1 − σ)) and s'' = σ(1 − σ)(2 + a(1 − 2σ)), the gradient of
h = s∘b is da = s'∘b∘dh, db = s∘dh. For cotangents u of da and v of db its own derivative is

    (dh)^ = s'∘b∘u + s∘v        â = dh∘(s''∘b∘u + s'∘v)        b̂ = dh∘s'∘u
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def explicit_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The contract of `longread.ops.swiglu.swiglu`."""
    return _Gate.apply(gate, up)


def _slope(a: Tensor, sigmoid: Tensor) -> Tensor:
    """s' = σ + σ (1 − σ) a"""
    return torch.addcmul(sigmoid, sigmoid.square().neg_().add_(sigmoid), a)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        return _GateGradient.apply(*ctx.saved_tensors, dh)


class _GateGradient(torch.autograd.Function):
    """(a, b, dh) -> (da, db)"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b, dh)
        sigmoid = a.sigmoid()
        return _slope(a, sigmoid).mul_(b).mul_(dh), sigmoid.mul_(a).mul_(dh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, dh = ctx.saved_tensors
        sigmoid = a.sigmoid()
        slope = _slope(a, sigmoid)
        bend = sigmoid.square().neg_().add_(sigmoid).mul_(2 + a * (1 - 2 * sigmoid))
        slope_u = slope * u
        dh_hat = (slope_u * b).addcmul_(sigmoid * a, v)
        a_hat = bend.mul_(b).mul_(u).addcmul_(slope, v).mul_(dh)
        return a_hat, slope_u.mul_(dh), dh_hat
