"""RMSNorm on a GPU: each derivative is one pass in which a program holds whole rows of every tensor in float32.

The formulas are those of explicit.py. A rotation R (`longread.ops.rotary`) after the norm is undone where dy is read
and done where y or (dy)^ is written, so all that lies between is the plain norm. Only x and ρ are kept. Sums over rows
are made of one partial sum for each program, so they are the same in every run; those of a shared gain go on from norm
to norm.

x is given out twice more: for who uses it beside the norm, and for the derivative (`longread.ops.needed`). What comes
back for either is added to dx in its pass. So is, in the derivative of that, what a residual passes on of dy to (dy)^.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import handed_on, needed_inputs
from longread.ops.rms_norm.shared import SharedGain
from longread.ops.rotary.triton import rotate_pairs, table_of
from longread.ops.tiles import (
    FORWARD_ELEMENTS_PER_WARP,
    ROW_COUNTS,
    PartialSums,
    load_wide,
    row_offsets,
    rows_of,
    store_partial_sum,
    tile_of,
)


def triton_rms_norm(
    x: Tensor,
    gain: Tensor | SharedGain,
    eps: float,
    *,
    residual: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """The contract of `longread.ops.rms_norm.rms_norm`, for rows of at most `WIDEST` numbers."""
    return _norm(x, gain, residual, rotary, eps)[0]


def triton_rms_norm_and_input(x: Tensor, gain: Tensor | SharedGain, eps: float) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.rms_norm.rms_norm_and_input`, for rows of at most `WIDEST` numbers."""
    return _norm(x, gain, None, None, eps)[:2]


def _norm(
    x: Tensor, gain: Tensor | SharedGain, residual: Tensor | None, rotary: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight, sums = gain if isinstance(gain, SharedGain) else (gain, None)
    table = None if rotary is None else table_of(rotary, x)
    return _Norm.apply(x, weight.contiguous(), residual, table, eps, sums)


class _Norm(torch.autograd.Function):
    """(x, gain, residual) -> (y; x for others; x for `_NormGradient`)"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        residual: Tensor | None,
        table: Tensor | None,
        eps: float,
        sums: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tile = tile_of(x.shape[-1], FORWARD_ELEMENTS_PER_WARP)
        # an absent tensor is stood for by x, which the kernel then does not read there
        rows = rows_of(x, x if table is None else table, x if residual is None else residual, outputs=1)
        scale = torch.empty(rows.total, device=x.device, dtype=torch.float32)
        if rows.total:
            _norm_forward[rows.grid(tile)](
                *rows.tensors,
                gain,
                scale,
                rows.total,
                rows.middle,
                rows.inner,
                *rows.strides,
                eps,
                D=x.shape[-1],
                WIDTH=tile.width,
                ROWS=tile.rows,
                TURN=table is not None,
                RESIDUAL=residual is not None,
                num_warps=tile.warps,
            )
        aside, read = handed_on(ctx, x, x)
        ctx.save_for_backward(read, gain, scale, table)
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return rows.tensors[-1], aside, read

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, aside: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, scale, table = ctx.saved_tensors
        _, with_gain, passes_on = (*needed_inputs(ctx), False)[:3]
        recorded = torch.is_grad_enabled()
        if aside is None or (left is not None and (recorded or dy is None)):
            aside, left = left if aside is None else aside + left, None  # type: ignore[operator]
        if dy is None:
            return aside, None, None, None, None, None
        if recorded and with_gain and ctx.sums is not None:
            raise RuntimeError("the gradient of a shared gain is taken once, at the end; it cannot be recorded")
        dx, dgain, dresidual = _NormGradient.apply(
            x, gain, dy, aside, left, scale, table, ctx.sums, with_gain, passes_on
        )
        return dx, dgain, dresidual, None, None, None


class _NormGradient(torch.autograd.Function):
    """(x, gain, dy, what else came for x) -> (dx, dgain, dy for the residual)

    The scale is a by-product of x and takes no gradient of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        dy: Tensor,
        aside: Tensor | None,
        left: Tensor | None,
        scale: Tensor,
        table: Tensor | None,
        sums: list[Tensor] | None,
        with_gain: bool,
        passes_on: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, gain, dy, scale, table)
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        tile = tile_of(x.shape[-1])
        added = [x if more is None else more for more in (aside, left)]
        rows = rows_of(x, x if table is None else table, dy, *added, outputs=1)
        partial = PartialSums.over(rows, tile, sums) if with_gain else None
        if rows.total:
            _norm_backward[rows.grid(tile) if partial is None else (partial.programs,)](
                *rows.tensors,
                gain,
                scale,
                scale if partial is None else partial.sums,
                rows.total,
                rows.middle,
                rows.inner,
                *rows.strides,
                D=x.shape[-1],
                WIDTH=tile.width,
                ROWS=tile.rows,
                TURN=table is not None,
                ADDED=(aside is not None) + (left is not None),
                WITH_GAIN=with_gain,
                ONTO=with_gain and sums is not None,
                num_warps=tile.warps,
            )
        dgain = None if partial is None else partial.total(gain.dtype)
        return rows.tensors[-1], dgain, handed_on(ctx, dy)[0] if passes_on else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, q: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gain, dy, scale, table = ctx.saved_tensors
        others = u if ctx.needs_input_grad[3] else None, *[None] * 6
        if u is None and q is None:
            return None, None, v, *others
        tile, with_gain = tile_of(x.shape[-1]), needed_inputs(ctx)[1]
        direction = torch.zeros_like(x) if u is None else u
        rows = rows_of(x, x if table is None else table, dy, direction, x if v is None else v, outputs=2)
        partial = PartialSums.over(rows, tile, ctx.sums) if with_gain else None
        if rows.total:
            _norm_second[rows.grid(tile) if partial is None else (partial.programs,)](
                *rows.tensors,
                gain,
                gain if q is None else q.contiguous(),
                scale,
                scale if partial is None else partial.sums,
                rows.total,
                rows.middle,
                rows.inner,
                *rows.strides,
                D=x.shape[-1],
                WIDTH=tile.width,
                ROWS=tile.rows,
                TURN=table is not None,
                FROM_GAIN=q is not None,
                ADDED=v is not None,
                WITH_GAIN=with_gain,
                ONTO=with_gain and ctx.sums is not None,
                num_warps=tile.warps,
            )
        dx_hat, dy_hat = rows.tensors[-2:]
        return dx_hat, None if partial is None else partial.total(gain.dtype), dy_hat, *others


@triton.jit(do_not_specialize_on_alignment=ROW_COUNTS)
def _norm_forward(
    x_ptr,
    table_ptr,
    residual_ptr,
    y_ptr,
    gain_ptr,
    scale_ptr,
    count,
    middle,
    inner,
    x_strides,
    table_strides,
    residual_strides,
    y_strides,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < count)[:, None] & (columns < D)
    gain = load_wide(gain_ptr, columns, columns < D)
    x = load_wide(x_ptr, row_offsets(rows, middle, inner, x_strides) + columns, inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(scale_ptr + rows, scale, mask=rows < count)
    y = x * scale[:, None] * gain
    if TURN:
        table = load_wide(table_ptr, row_offsets(rows, middle, inner, table_strides) + columns, inside)
        y = rotate_pairs(y, table, False)
    if RESIDUAL:
        y += load_wide(residual_ptr, row_offsets(rows, middle, inner, residual_strides) + columns, inside)
    tl.store(y_ptr + row_offsets(rows, middle, inner, y_strides) + columns, y, mask=inside)


@triton.jit(do_not_specialize_on_alignment=ROW_COUNTS)
def _norm_backward(
    x_ptr,
    table_ptr,
    dy_ptr,
    aside_ptr,
    left_ptr,
    dx_ptr,
    gain_ptr,
    scale_ptr,
    partial_ptr,
    count,
    middle,
    inner,
    x_strides,
    table_strides,
    dy_strides,
    aside_strides,
    left_strides,
    dx_strides,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
    ADDED: tl.constexpr,
    WITH_GAIN: tl.constexpr,
    ONTO: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)[None, :]
    gain = load_wide(gain_ptr, columns, columns < D)
    dgain = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & (columns < D)
        scale = tl.load(scale_ptr + rows, mask=rows < count, other=0.0)[:, None]
        n = load_wide(x_ptr, row_offsets(rows, middle, inner, x_strides) + columns, inside) * scale
        dy = load_wide(dy_ptr, row_offsets(rows, middle, inner, dy_strides) + columns, inside)
        if TURN:
            table = load_wide(table_ptr, row_offsets(rows, middle, inner, table_strides) + columns, inside)
            dy = rotate_pairs(dy, table, True)
        added = tl.zeros((ROWS, WIDTH), tl.float32)
        if ADDED > 0:
            added = load_wide(aside_ptr, row_offsets(rows, middle, inner, aside_strides) + columns, inside)
        if ADDED > 1:
            added += load_wide(left_ptr, row_offsets(rows, middle, inner, left_strides) + columns, inside)
        k = dy * gain
        s = tl.sum(n * k, axis=1)[:, None] / D
        dx = row_offsets(rows, middle, inner, dx_strides) + columns
        tl.store(dx_ptr + dx, scale * (k - n * s) + added, mask=inside)
        if WITH_GAIN:
            dgain += dy * n
    if WITH_GAIN:
        store_partial_sum(partial_ptr, dgain, D, WIDTH, ONTO)


@triton.jit(do_not_specialize_on_alignment=ROW_COUNTS)
def _norm_second(
    x_ptr,
    table_ptr,
    dy_ptr,
    u_ptr,
    v_ptr,
    dx_hat_ptr,
    dy_hat_ptr,
    gain_ptr,
    q_ptr,
    scale_ptr,
    partial_ptr,
    count,
    middle,
    inner,
    x_strides,
    table_strides,
    dy_strides,
    u_strides,
    v_strides,
    dx_hat_strides,
    dy_hat_strides,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
    FROM_GAIN: tl.constexpr,
    ADDED: tl.constexpr,
    WITH_GAIN: tl.constexpr,
    ONTO: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)[None, :]
    gain = load_wide(gain_ptr, columns, columns < D)
    if FROM_GAIN:
        q = load_wide(q_ptr, columns, columns < D)
    gain_hat = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & (columns < D)
        scale = tl.load(scale_ptr + rows, mask=rows < count, other=0.0)[:, None]
        n = load_wide(x_ptr, row_offsets(rows, middle, inner, x_strides) + columns, inside) * scale
        dy = load_wide(dy_ptr, row_offsets(rows, middle, inner, dy_strides) + columns, inside)
        u = load_wide(u_ptr, row_offsets(rows, middle, inner, u_strides) + columns, inside)
        if TURN:
            table = load_wide(table_ptr, row_offsets(rows, middle, inner, table_strides) + columns, inside)
            dy = rotate_pairs(dy, table, True)
        added = tl.zeros((ROWS, WIDTH), tl.float32)
        if ADDED:
            added = load_wide(v_ptr, row_offsets(rows, middle, inner, v_strides) + columns, inside)
        k = dy * gain
        s = tl.sum(n * k, axis=1)[:, None] / D
        m = tl.sum(n * u, axis=1)[:, None] / D
        n_dot = scale * (u - n * m)
        s_dot = tl.sum(n_dot * k, axis=1)[:, None] / D
        bend = n_dot * s + scale * m * (k - n * s)
        dy_hat = gain * n_dot
        if FROM_GAIN:
            k_dot = q * dy
            s_dot += tl.sum(n * k_dot, axis=1)[:, None] / D
            bend -= k_dot
            dy_hat += q * n
        dx_hat = row_offsets(rows, middle, inner, dx_hat_strides) + columns
        tl.store(dx_hat_ptr + dx_hat, -scale * (bend + n * s_dot), mask=inside)
        if TURN:
            dy_hat_turned = rotate_pairs(dy_hat, table, False)
        else:
            dy_hat_turned = dy_hat
        out = row_offsets(rows, middle, inner, dy_hat_strides) + columns
        tl.store(dy_hat_ptr + out, dy_hat_turned + added, mask=inside)
        if WITH_GAIN:
            gain_hat += dy * n_dot
    if WITH_GAIN:
        store_partial_sum(partial_ptr, gain_hat, D, WIDTH, ONTO)
