"""The rotary embedding in one pass: each program turns a tile of whole rows in float32."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longread.ops.tiles import ROW_COUNTS, load_wide, row_offsets, rows_of, tile_of


def triton_rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """The contract of `longread.ops.rotary.rotate`."""
    return _Rotation.apply(x, table_of(rotary, x), False)


def table_of(rotary: Tensor, like: Tensor) -> Tensor:
    """The unit complex numbers [T, H/2] as rows cos, sin, cos, sin … in float32, a view of the shape of `like`."""
    return torch.view_as_real(rotary.to(torch.complex64)).flatten(-2).expand(like.shape)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.back = back
        rows, tile = rows_of(x, table, outputs=1), tile_of(x.shape[-1])
        if rows.total:
            _rotate[rows.grid(tile)](
                *rows.tensors,
                rows.total,
                rows.middle,
                rows.inner,
                *rows.strides,
                D=x.shape[-1],
                WIDTH=tile.width,
                ROWS=tile.rows,
                BACK=back,
                num_warps=tile.warps,
            )
        return rows.tensors[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _Rotation.apply(dy, table, not ctx.back), None, None


@triton.jit
def rotate_pairs(x, table, BACK: tl.constexpr):
    """Rotates the pairs of a tile [R, H] by the angles whose cosine and sine alternate in `table` [R, H]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    cos, sin = tl.split(tl.reshape(table, (x.shape[0], x.shape[1] // 2, 2)))
    if BACK:
        sin = -sin
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (x.shape[0], x.shape[1]))


@triton.jit(do_not_specialize_on_alignment=ROW_COUNTS)
def _rotate(
    x_ptr,
    table_ptr,
    out_ptr,
    count,
    middle,
    inner,
    x_strides,
    table_strides,
    out_strides,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BACK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < count)[:, None] & (columns < D)
    x = load_wide(x_ptr, row_offsets(rows, middle, inner, x_strides) + columns, inside)
    table = load_wide(table_ptr, row_offsets(rows, middle, inner, table_strides) + columns, inside)
    out = row_offsets(rows, middle, inner, out_strides) + columns
    tl.store(out_ptr + out, rotate_pairs(x, table, BACK), mask=inside)
