"""RMSNorm with its derivatives written out, each a handful of passes over memory.

With ρ = (mean x² + eps)^-1/2, n = ρ x, y = g∘n and k = g∘dy, the gradient is dx = ρ (k − n mean(n∘k)) and
dg = Σ dy∘n. Its own derivative, for cotangents u of dx and q of dg, is the tangent of the norm in the
direction u followed by the gradient of ⟨dy, ẏ⟩:

    ṅ = ρ (u − n mean(n∘u))        k̇ = q∘dy        ṡ = mean(ṅ∘k) + mean(n∘k̇)
    (dy)^ = q∘n + g∘ṅ              ĝ = Σ dy∘ṅ
    x̂ = −ρ² mean(n∘u) (k − n s) + ρ (k̇ − ṅ s − n ṡ)      with s = mean(n∘k)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs
from longread.ops.rotary import rotate


def explicit_rms_norm(
    x: Tensor, gain: Tensor, eps: float, *, residual: Tensor | None = None, rotary: Tensor | None = None
) -> Tensor:
    """The contract of `longread.ops.rms_norm.rms_norm`."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    gain = gain.to(wide.dtype)
    # autograd's own part of a small norm takes as long as the norm, so reading goes without it
    out = _Norm.apply(wide, gain, eps) if torch.is_grad_enabled() else _scaled(wide, gain, _scale(wide, eps))
    out = out.to(x.dtype)
    if rotary is not None:
        out = rotate(out, rotary)
    return out if residual is None else residual + out


def _mean_of_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


def _scale(x: Tensor, eps: float) -> Tensor:
    return _mean_of_product(x, x).add_(eps).rsqrt_()


def _scaled(x: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).mul_(gain)


def _sum_to_gain(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(-1, a.shape[-1]).sum(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, gain, scale)
        return _scaled(x, gain, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, gain, scale = ctx.saved_tensors
        dx, dgain = _NormGradient.apply(x, gain, dy, scale, needed_inputs(ctx)[1])
        return dx, dgain, None


class _NormGradient(torch.autograd.Function):
    """(x, gain, dy) -> (dx, dgain); the scale is a by-product of x and takes no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, dy: Tensor, scale: Tensor, with_gain: bool
    ) -> tuple[Tensor, Tensor | None]:
        n = x * scale
        k = dy * gain
        s = _mean_of_product(n, k)
        dgain = _sum_to_gain(dy, n) if with_gain else None
        ctx.save_for_backward(x, gain, dy, scale, s)
        ctx.set_materialize_grads(False)
        return (k.addcmul_(n, s, value=-1)).mul_(scale), dgain

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u: Tensor | None, q: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, gain, dy, scale, s = ctx.saved_tensors
        n = x * scale
        k = dy * gain
        dx_hat = dgain_hat = dy_hat = None
        if u is not None:
            m = _mean_of_product(n, u)
            n_dot = torch.addcmul(u, n, m, value=-1).mul_(scale)
            dy_hat = n_dot * gain
            dgain_hat = _sum_to_gain(dy, n_dot)
            # scale * (-scale m (k - n s) - n_dot s - n mean(n_dot k))
            s_dot = _mean_of_product(n_dot, k)
            dx_hat = k.addcmul(n, s, value=-1).mul_(scale * m).addcmul_(n_dot, s).addcmul_(n, s_dot)
            dx_hat = dx_hat.mul_(-scale)
        if q is not None:
            k_dot = dy * q
            from_gain = k_dot.addcmul_(n, _mean_of_product(n, k_dot), value=-1).mul_(scale)
            dx_hat = from_gain if dx_hat is None else dx_hat.add_(from_gain)
            dy_hat = n * q if dy_hat is None else dy_hat.addcmul_(n, q)
        return dx_hat, dgain_hat, dy_hat, None, None
