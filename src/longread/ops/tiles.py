"""Rows of strided tensors as the tiles of a Triton program. Needs Triton.

The last dimension of a tensor is a row. The others are merged into at most three that all tensors share, so heads
inside [B, T, N, H] and their transposed views are read where they lie, without a copy.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_WARP = 512
"""Elements of a tile for each warp, 16 a thread: a row of every tensor of a second derivative fits in registers."""
FORWARD_ELEMENTS_PER_WARP = 1024
"""A forward holds less."""
SMALLEST_TILE = 2048
WARPS_PER_PROCESSOR = 16
"""Of a kernel whose programs walk over many tiles; enough loads in flight to keep the memory busy."""


ROW_COUNTS = ["count", "middle", "inner"]
"""Arguments of kernels: that they are multiples of 16 helps no load, and would compile a kernel twice."""
Strides = tuple[int, ...]
"""Distances of the three merged dimensions, slowest first, in elements."""


class Rows(NamedTuple):
    """The row dimensions that some tensors share, slowest first."""

    total: int
    middle: int
    inner: int
    tensors: tuple[Tensor, ...]
    """The inputs, copied only where their strides fit in no three dimensions; then the outputs, not yet set."""
    strides: tuple[Strides, ...]
    """One for each tensor."""

    def grid(self, tile: "Tile") -> tuple[int]:
        """One program for each tile."""
        return (triton.cdiv(self.total, tile.rows),)


def rows_of(*inputs: Tensor, outputs: int) -> Rows:
    """The rows of inputs of one shape [..., D] and of new outputs like the first.

    Rows are numbered as they lie in the memory of the first, whatever the strides of the others.
    """
    inputs = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    first = inputs[0]
    order = sorted(range(first.dim() - 1), key=first.stride, reverse=True)
    tensors = (*inputs, *(torch.empty_like(first) for _ in range(outputs)))
    merged = _merge(tensors, order)
    if len(merged) > 3:
        tensors = tuple(_laid_out(x, order, copied=i < len(inputs)) for i, x in enumerate(tensors))
        merged = _merge(tensors, order)
    missing = 3 - len(merged)
    sizes = [1] * missing + [size for size, _ in merged]
    columns = [(0,) * len(tensors)] * missing + [strides for _, strides in merged]
    return Rows(sizes[0] * sizes[1] * sizes[2], sizes[1], sizes[2], tensors, tuple(zip(*columns, strict=True)))


def _merge(tensors: Sequence[Tensor], order: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Size and strides of each row dimension, after joining neighbours that are one dimension in every tensor."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for dim in order:
        size, strides = tensors[0].shape[dim], tuple(x.stride(dim) for x in tensors)
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(stride * size for stride in strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def _laid_out(x: Tensor, order: Sequence[int], copied: bool) -> Tensor:
    """The tensor, or an unset one like it, with its dimensions in memory in the given order, the last one last."""
    permuted = x.permute(*order, -1)
    dense = permuted.contiguous() if copied else permuted.new_empty(permuted.shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return dense.permute(*back, -1)


class Tile(NamedTuple):
    """How many rows a program holds at a time, how wide they are, padded to a power of 2, and its warps."""

    rows: int
    width: int
    warps: int


def tile_of(row_length: int, elements_per_warp: int = ELEMENTS_PER_WARP) -> Tile:
    """The tile for rows of that length: whole rows, several where they are short."""
    width = triton.next_power_of_2(row_length)
    rows = max(1, SMALLEST_TILE // width)
    return Tile(rows, width, max(1, min(32, rows * width // elements_per_warp)))


class PartialSums(NamedTuple):
    """The sums over rows of a kernel whose programs walk over many tiles, one for each program."""

    sums: Tensor
    """float32 [at least `programs`, D]."""
    programs: int
    goes_on: bool
    """Whether kernels to come add to them."""

    @classmethod
    def over(cls, rows: Rows, tile: Tile, kept: list[Tensor] | None) -> "PartialSums":
        """Space for them, not yet set; with `kept` what that holds, zeros at first, for the kernel to add to."""
        like = rows.tensors[0]
        most = processors(like) * max(1, WARPS_PER_PROCESSOR // tile.warps)
        programs = min(rows.grid(tile)[0], most)
        if kept is None:
            new = like.new_empty if programs else like.new_zeros
            return cls(new(max(1, programs), like.shape[-1], dtype=torch.float32), programs, False)
        if not kept:
            kept.append(like.new_zeros(most, like.shape[-1], dtype=torch.float32))
        return cls(kept[0], programs, True)

    def total(self, dtype: torch.dtype) -> Tensor | None:
        """[D], unless kernels to come add to it."""
        return None if self.goes_on else self.sums.sum(0).to(dtype)


def processors(x: Tensor) -> int:
    """How many the device of x has; 2 in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


@triton.jit
def row_offsets(rows, middle, inner, strides):
    """Where each of the given rows begins, int64 [R, 1]."""
    outer_index = (rows // (middle * inner)).to(tl.int64)
    middle_index = (rows // inner % middle).to(tl.int64)
    inner_index = (rows % inner).to(tl.int64)
    return (outer_index * strides[0] + middle_index * strides[1] + inner_index * strides[2])[:, None]


@triton.jit
def load_wide(pointer, offsets, inside):
    """A tile in float32, 0 where nothing is."""
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_partial_sum(pointer, tile, D: tl.constexpr, WIDTH: tl.constexpr, ONTO: tl.constexpr):
    """The sum over the rows of a tile as this program's partial sum, or onto it."""
    columns = tl.arange(0, WIDTH)[None, :]
    place = pointer + tl.program_id(0) * D + columns
    total = tl.sum(tile, axis=0, keep_dims=True)
    if ONTO:
        total += tl.load(place, mask=columns < D, other=0.0)
    tl.store(place, total, mask=columns < D)
