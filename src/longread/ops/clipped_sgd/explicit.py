"""Clipped SGD with its derivative written out: two passes forward, two backward.

With λ arriving for the new weights, the old weights receive λ and the gradient receives

    −lr λ                                       where ‖g‖ <= clip
    −lr (clip / ‖g‖) (λ − g ⟨g, λ⟩ / ‖g‖²)      where ‖g‖ > clip

so nothing is divided by a norm that may be zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from longread.ops.collective import summed


def refused(norm: Tensor, *, lr: float | Tensor, clip: float | None, max_step_norm: Tensor) -> Tensor:
    """Which steps the guard of `clipped_sgd` does not take: too long, or not finite. Bool, shaped as `norm`."""
    length = lr * (norm if clip is None else norm.clamp(max=clip))
    return ~(norm.isfinite() & (length <= max_step_norm))


def explicit_clipped_sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    clip: float | None,
    max_step_norm: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The contract of `longread.ops.clipped_sgd.clipped_sgd`."""
    wide = [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]
    *stepped, norm = _Step.apply(lr, clip, group, *weights, *wide)
    if max_step_norm is not None:
        kept = refused(norm, lr=lr, clip=clip, max_step_norm=max_step_norm)
        if norm.is_cuda or kept.any():  # a GPU is not waited for, and a CPU is spared a pass over the weights
            stepped = [torch.where(_per_sequence(kept, w), w, new) for w, new in zip(weights, stepped, strict=True)]
    return tuple(stepped), norm


def _dot(left: Sequence[Tensor], right: Sequence[Tensor], group: ProcessGroup | None) -> Tensor:
    """⟨left, right⟩ per sequence, over all tensors of all ranks of the group: [B]"""
    products = [torch.linalg.vecdot(a.flatten(1), b.flatten(1)) for a, b in zip(left, right, strict=True)]
    return summed(torch.stack(products).sum(0), group)


def _per_sequence(factor: Tensor, like: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (like.dim() - 1))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lr: float | Tensor, clip: float | None, group: ProcessGroup | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, gradients = tensors[:count], tensors[count:]
        norm = _dot(gradients, gradients, group).sqrt()
        # where the norm is small the factor is exactly 1, so the division by a tiny norm is never used
        scale = torch.ones_like(norm) if clip is None else torch.where(norm > clip, clip / norm, 1.0)
        ctx.save_for_backward(norm, scale, *gradients)
        ctx.lr, ctx.clip, ctx.group = lr, clip, group
        ctx.mark_non_differentiable(norm)
        step = lr * scale
        stepped = [
            torch.addcmul(w, g, _per_sequence(step, g), value=-1) for w, g in zip(weights, gradients, strict=True)
        ]
        return *stepped, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Any, ...]:
        norm, scale, *gradients = ctx.saved_tensors
        to_weights = adjoints[:-1]  # the last one belongs to the norm
        if not any(ctx.needs_input_grad[3 + len(gradients) :]):
            return None, None, None, *to_weights, *[None] * len(gradients)
        factor = -ctx.lr * scale
        to_gradients = [adjoint * _per_sequence(factor, adjoint) for adjoint in to_weights]
        if ctx.clip is not None:
            dot = _dot(gradients, to_weights, ctx.group)
            radial = torch.where(norm > ctx.clip, -factor * dot / norm.square(), 0.0)
            for out, gradient in zip(to_gradients, gradients, strict=True):
                out.addcmul_(gradient, _per_sequence(radial, gradient))
        return None, None, None, *to_weights, *to_gradients
