"""Clipped SGD on a GPU with the formulas of explicit.py: two passes over memory forward, two backward.

    forward    read g: ‖g‖²        read W and g, write W' (in place: over W, and once more in the type of products)
    backward   read g, λ: ⟨g, λ⟩   read g and λ, write the adjoint of g; g is left out where nothing was clipped

Where the step gave the weights in the type of the products too, λ comes in two parts, and the last pass writes their
sum, which is the adjoint of the old weights.

Sums are made of one partial sum for each program, added in a fixed order; ranks add partial sum to partial sum. Weights
may be one matrix shared by all sequences (stride 0 between them); gradients may be float32 or half precision, and are
kept as they came.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from longread.ops.collective import summed

BLOCK, WARPS = 4096, 8
PROGRAMS = 1056
"""Programs that sum over one tensor of all sequences: eight for each processor of an H100 or H200."""
SUM_BLOCK = 1024


def triton_clipped_sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    clip: float | None,
    max_step_norm: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The contract of `longread.ops.clipped_sgd.clipped_sgd`."""
    *stepped, norm = _Step.apply(lr, clip, max_step_norm, group, None, *weights, *gradients)
    return tuple(stepped), norm


def triton_clipped_sgd_and_cast(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    lr: float | Tensor,
    clip: float | None,
    group: ProcessGroup | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The contract of `longread.ops.clipped_sgd.clipped_sgd_and_cast`."""
    *both, norm = _Step.apply(lr, clip, None, group, dtype, *weights, *gradients)
    return tuple(both[: len(weights)]), tuple(both[len(weights) :]), norm


def _by_sequence(x: Tensor) -> Tensor:
    """[B, n] with the numbers of a sequence side by side."""
    return x.flatten(1) if x[:1].is_contiguous() else x.contiguous().flatten(1)


def triton_clipped_sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    working: Sequence[Tensor],
    *,
    lr: float | Tensor,
    clip: float | None,
    max_step_norm: Tensor | None = None,
) -> Tensor:
    """The contract of `longread.ops.clipped_sgd.clipped_sgd_`."""
    gradients = [_by_sequence(g) for g in gradients]
    norm, step = _norm_and_step(gradients, lr, clip, max_step_norm)
    for weight, gradient, copy in zip(weights, gradients, working, strict=True):
        _update(weight, gradient, step, weight, copy, guarded=max_step_norm is not None)
    return norm


def _norm_and_step(
    gradients: Sequence[Tensor],
    lr: float | Tensor,
    clip: float | None,
    max_step_norm: Tensor | None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each sequence, [B]: the norm of its gradient, and what the gradient is multiplied with; 0 if refused."""
    batch_size, device = len(gradients[0]), gradients[0].device
    norm, step = (torch.empty(batch_size, device=device, dtype=torch.float32) for _ in range(2))
    squares = summed(_dots(gradients, gradients, None, 0.0), group)
    if batch_size:
        _sgd_norm[(batch_size,)](
            squares,
            norm,
            step,
            lr,
            max_step_norm,
            squares.shape[1],
            0.0 if clip is None else clip,
            SUM_BLOCK=SUM_BLOCK,
            CLIPS=clip is not None,
            LR_IS_TENSOR=isinstance(lr, Tensor),
        )
    return norm, step


def _update(weight: Tensor, gradient: Tensor, step: Tensor, out: Tensor, copy: Tensor | None, *, guarded: bool) -> None:
    """out = weight − step · gradient, and the same once more in the type of `copy`."""
    flat = _by_sequence(weight)
    if flat.numel():
        _sgd_update[_grid(flat)](
            flat,
            gradient,
            out,
            copy,
            step,
            flat.shape[1],
            flat.stride(0),
            gradient.stride(0),
            BLOCK=BLOCK,
            GUARDED=guarded,
            num_warps=WARPS,
        )


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lr: float | Tensor,
        clip: float | None,
        max_step_norm: Tensor | None,
        group: ProcessGroup | None,
        dtype: torch.dtype | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """The new weights, the same in `dtype` if it is given, and the norm."""
        count = len(tensors) // 2
        weights, gradients = tensors[:count], [_by_sequence(g) for g in tensors[count:]]
        norm, step = _norm_and_step(gradients, lr, clip, max_step_norm, group)
        stepped = [torch.empty(w.shape, device=w.device, dtype=w.dtype) for w in weights]
        copies = [] if dtype is None else [torch.empty_like(w, dtype=dtype) for w in stepped]
        for weight, gradient, out, copy in zip_longest(weights, gradients, stepped, copies):
            _update(weight, gradient, step, out, copy, guarded=max_step_norm is not None)
        ctx.save_for_backward(norm, step, *gradients)
        ctx.clip, ctx.group = clip, group
        ctx.mark_non_differentiable(norm)
        ctx.set_materialize_grads(False)
        ctx.shapes = [w.shape for w in stepped]
        return *stepped, *copies, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Any, ...]:
        norm, step, *gradients = ctx.saved_tensors
        count, constants = len(gradients), (None,) * 5
        parts = list(zip_longest(adjoints[:count], adjoints[count:-1]))  # the last one belongs to the norm
        if not any(ctx.needs_input_grad[5 + count :]):
            return *constants, *(_wide(*part) for part in parts), *[None] * count
        if all(wide is None and narrow is None for wide, narrow in parts):
            return *constants, *[None] * (2 * count)
        parts = [
            (_wide(wide, narrow), None) if wide is None or narrow is None else (wide, narrow) for wide, narrow in parts
        ]
        wide = [
            _by_sequence(norm.new_zeros(shape) if x is None else x)
            for (x, _), shape in zip(parts, ctx.shapes, strict=True)
        ]
        narrow = [None if x is None else _by_sequence(x) for _, x in parts]
        radial = torch.empty_like(norm)
        clip = float("inf") if ctx.clip is None else ctx.clip
        if len(norm):
            dots = None if ctx.clip is None else summed(_dots(gradients, wide, norm, clip, narrow), ctx.group)
            _sgd_radial[(len(norm),)](
                norm if dots is None else dots,
                norm,
                step,
                radial,
                1 if dots is None else dots.shape[1],
                clip,
                SUM_BLOCK=SUM_BLOCK,
            )
        to_weights, to_gradients = [], []
        for gradient, adjoint, second, shape in zip(gradients, wide, narrow, ctx.shapes, strict=True):
            out = torch.empty(shape, device=gradient.device, dtype=gradient.dtype)
            total = None if second is None else torch.empty(shape, device=adjoint.device, dtype=adjoint.dtype)
            if gradient.numel():
                _sgd_pull_back[_grid(gradient)](
                    gradient,
                    adjoint,
                    second,
                    out,
                    total,
                    norm,
                    step,
                    radial,
                    gradient.shape[1],
                    gradient.stride(0),
                    adjoint.stride(0),
                    0 if second is None else second.stride(0),
                    clip,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                )
            to_gradients.append(out)
            to_weights.append(adjoint.view(shape) if total is None else total)
        return *constants, *to_weights, *to_gradients


def _wide(wide: Tensor | None, narrow: Tensor | None) -> Tensor | None:
    """The sum of two adjoints of a weight, in the type of the weight, which is float32."""
    if narrow is None:
        return wide
    return narrow.float() if wide is None else wide + narrow


def _grid(flat: Tensor) -> tuple[int, int]:
    return triton.cdiv(flat.shape[1], BLOCK), flat.shape[0]


def _dots(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    norm: Tensor | None,
    clip: float,
    second: Sequence[Tensor | None] = (),
) -> Tensor:
    """Partial sums of ⟨left, right + second⟩ for each sequence, over all tensors: [B, parts].

    With `norm`, only for the sequences whose norm is greater than `clip`; the others get zeros.
    """
    batch_size = len(left[0])
    parts = [max(1, min(triton.cdiv(x.shape[1], BLOCK), PROGRAMS // max(1, batch_size))) for x in left]
    partial = torch.empty(batch_size, sum(parts), device=left[0].device, dtype=torch.float32)
    for i, (a, b, more) in enumerate(zip_longest(left, right, second)):
        if batch_size:
            _sgd_dot[(parts[i], batch_size)](
                a,
                b,
                more,
                partial if norm is None else norm,
                partial,
                a.shape[1],
                a.stride(0),
                b.stride(0),
                0 if more is None else more.stride(0),
                sum(parts),
                sum(parts[:i]),
                clip,
                BLOCK=BLOCK,
                ONLY_CLIPPED=norm is not None,
                SQUARE=norm is None,
                num_warps=WARPS,
            )
    return partial


@triton.jit
def _sgd_dot(
    a_ptr,
    b_ptr,
    more_ptr,
    norm_ptr,
    partial_ptr,
    size,
    a_stride,
    b_stride,
    more_stride,
    num_partial,
    first_partial,
    clip,
    BLOCK: tl.constexpr,
    ONLY_CLIPPED: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """Each program takes every so manieth block of one sequence."""
    sequence = tl.program_id(1).to(tl.int64)
    a_ptr += sequence * a_stride
    b_ptr += sequence * b_stride
    end = size
    if ONLY_CLIPPED:
        end = tl.where(tl.load(norm_ptr + sequence) > clip, size, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + place, mask=place < size, other=0.0).to(tl.float32)
        if SQUARE:
            total += a * a
        else:
            b = tl.load(b_ptr + place, mask=place < size, other=0.0).to(tl.float32)
            if more_ptr is not None:
                b += tl.load(more_ptr + sequence * more_stride + place, mask=place < size, other=0.0).to(tl.float32)
            total += a * b
    tl.store(partial_ptr + sequence * num_partial + first_partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _sum(partial_ptr, num_partial, SUM_BLOCK: tl.constexpr):
    total = tl.zeros((SUM_BLOCK,), tl.float32)
    for first in range(0, num_partial, SUM_BLOCK):
        place = first + tl.arange(0, SUM_BLOCK)
        total += tl.load(partial_ptr + place, mask=place < num_partial, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sgd_norm(
    squares_ptr,
    norm_ptr,
    step_ptr,
    lr,
    longest_ptr,
    num_partial,
    clip,
    SUM_BLOCK: tl.constexpr,
    CLIPS: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
):
    """The norm of one sequence's gradient, and what its gradient is multiplied with."""
    sequence = tl.program_id(0)
    norm = tl.sqrt(_sum(squares_ptr + sequence * num_partial, num_partial, SUM_BLOCK))
    if LR_IS_TENSOR:
        step = tl.load(lr).to(tl.float32)
    else:
        step = lr
    if CLIPS:
        step = step * (clip / tl.maximum(norm, clip))
    if longest_ptr is not None:  # what is not a number is not smaller either
        step = tl.where(step * norm <= tl.load(longest_ptr), step, 0.0)
        step = tl.where(norm < float("inf"), step, 0.0)
    tl.store(norm_ptr + sequence, norm)
    tl.store(step_ptr + sequence, step)


@triton.jit
def _sgd_update(
    weight_ptr,
    gradient_ptr,
    out_ptr,
    copy_ptr,
    step_ptr,
    size,
    weight_stride,
    gradient_stride,
    BLOCK: tl.constexpr,
    GUARDED: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    weight = tl.load(weight_ptr + sequence * weight_stride + place, mask=inside).to(tl.float32)
    step = tl.load(step_ptr + sequence)
    num_read = size
    if GUARDED:  # nothing is read for a refused step: 0 times what is not a number would be none either
        num_read = tl.where(step != 0, size, 0)
    gradient = tl.load(gradient_ptr + sequence * gradient_stride + place, mask=place < num_read, other=0.0)
    weight -= step * gradient.to(tl.float32)
    tl.store(out_ptr + sequence * size + place, weight, mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + sequence * size + place, weight, mask=inside)


@triton.jit
def _sgd_radial(dots_ptr, norm_ptr, step_ptr, radial_ptr, num_partial, clip, SUM_BLOCK: tl.constexpr):
    """The factor of g in its adjoint."""
    sequence = tl.program_id(0)
    norm = tl.load(norm_ptr + sequence)
    dot = _sum(dots_ptr + sequence * num_partial, num_partial, SUM_BLOCK)
    radial = tl.load(step_ptr + sequence) * dot / tl.where(norm > clip, norm * norm, 1.0)
    tl.store(radial_ptr + sequence, tl.where(norm > clip, radial, 0.0))


@triton.jit
def _sgd_pull_back(
    gradient_ptr,
    adjoint_ptr,
    second_ptr,
    out_ptr,
    total_ptr,
    norm_ptr,
    step_ptr,
    radial_ptr,
    size,
    gradient_stride,
    adjoint_stride,
    second_stride,
    clip,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    adjoint = tl.load(adjoint_ptr + sequence * adjoint_stride + place, mask=inside).to(tl.float32)
    if second_ptr is not None:
        adjoint += tl.load(second_ptr + sequence * second_stride + place, mask=inside).to(tl.float32)
        tl.store(total_ptr + sequence * size + place, adjoint, mask=inside)
    out = -tl.load(step_ptr + sequence) * adjoint
    # a masked load of nothing is no traffic
    num_read = tl.where(tl.load(norm_ptr + sequence) > clip, size, 0)
    gradient = tl.load(gradient_ptr + sequence * gradient_stride + place, mask=place < num_read, other=0.0)
    out += tl.load(radial_ptr + sequence) * gradient.to(tl.float32)
    tl.store(out_ptr + sequence * size + place, out, mask=inside)
