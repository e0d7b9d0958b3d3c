"""The gate with its derivatives written out.

Both activations are s = aσ with σ = sigmoid(w): silu has w = a, and as (1 + tanh y) / 2 = sigmoid(2y), GELU has
w = 2κ(a + 0.044715 a³) with κ = √(2/π). So s' = σ + σ(1 − σ)aw' and s'' = σ(1 − σ)(2w' + a(w'' + w'²(1 − 2σ))).

The gradient of h = s∘b is da = s'∘b∘dh, db = s∘dh. For cotangents u of da and v of db its own derivative is

    (dh)^ = s'∘b∘u + s∘v        â = dh∘(s''∘b∘u + s'∘v)        b̂ = dh∘s'∘u
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longread.ops.swiglu.reference import Activation

TWICE_KAPPA, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
"""Of w = 2κ(a + 0.044715 a³)."""


def explicit_swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.swiglu.swiglu`."""
    if activation == "gelu_tanh" and gate.itemsize < 4:  # a³ is beyond float16 from 41, and rounded badly in bfloat16
        return _Gate.apply(gate.float(), up.float(), activation).to(gate.dtype)
    return _Gate.apply(gate, up, activation)


class _Curve:
    """σ, s' and s'' of the activation at a."""

    def __init__(self, a: Tensor, activation: Activation) -> None:
        self._a = a
        self._steep: Tensor | None = None  # w'; None: 1 everywhere
        inner = a
        if activation == "gelu_tanh":
            square = a.square()
            inner = (1 + CUBIC * square).mul_(a).mul_(TWICE_KAPPA)
            self._steep = square.mul_(3 * CUBIC).add_(1).mul_(TWICE_KAPPA)
        self.sigmoid = inner.sigmoid()

    def _bump(self) -> Tensor:
        return self.sigmoid.square().neg_().add_(self.sigmoid)

    def slope(self) -> Tensor:
        """s' = σ + σ (1 − σ) a w'"""
        bump = self._bump()
        return torch.addcmul(self.sigmoid, bump if self._steep is None else bump.mul_(self._steep), self._a)

    def bend(self) -> Tensor:
        """s'' = σ (1 − σ) (2 w' + a (w'' + w'² (1 − 2σ)))"""
        if self._steep is None:
            return self._bump().mul_(2 + self._a * (1 - 2 * self.sigmoid))
        turn = self._steep.square().mul_(1 - 2 * self.sigmoid).add_(self._a, alpha=6 * TWICE_KAPPA * CUBIC)
        return self._bump().mul_(turn.mul_(self._a).add_(self._steep, alpha=2))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.activation = activation
        return (F.silu(a) if activation == "silu" else F.gelu(a, approximate="tanh")).mul_(b)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_GateGradient.apply(*ctx.saved_tensors, dh, ctx.activation), None


class _GateGradient(torch.autograd.Function):
    """(a, b, dh) -> (da, db)"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dh: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b, dh)
        ctx.activation = activation
        curve = _Curve(a, activation)
        return curve.slope().mul_(b).mul_(dh), curve.sigmoid.mul_(a).mul_(dh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, b, dh = ctx.saved_tensors
        curve = _Curve(a, ctx.activation)
        slope = curve.slope()
        slope_u = slope * u
        dh_hat = (slope_u * b).addcmul_(curve.sigmoid * a, v)
        a_hat = curve.bend().mul_(b).mul_(u).addcmul_(slope, v).mul_(dh)
        return a_hat, slope_u.mul_(dh), dh_hat, None
