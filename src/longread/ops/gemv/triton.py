"""One kernel from a residual stream to the products of its next sub-layer; bound by reading the matrices.

A program holds whole rows of a matrix and the whole vector. It asks for its rows first and computes the norms, every
program for itself, while they are on their way; the first writes the stream down. Of a large matrix it goes on to other
rows, and asks for the next before it looks at those it has. Sums are in one order, so they are the same in every run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longread.ops.gemv.reference import Stream
from longread.ops.rms_norm import Gain
from longread.ops.swiglu import Activation
from longread.ops.swiglu.triton import gate_sigmoid
from longread.ops.tiles import load_wide, processors

ELEMENTS, MOST_WARPS = 32_768, 8
"""Of matrices in a program: enough bytes on their way to keep the memory busy."""
PROGRAMS = 2048
"""A smaller matrix is divided among so many programs at least, sixteen for each processor of an H200."""
LARGE = 32_000_000
"""Bytes of matrices from which programs go on to other rows. With less, loops are too short to gain by it."""
ELEMENTS_AT_A_TIME, MOST_LOOPING_WARPS, STAGES = 8192, 4, 3
"""Of such a program."""
RESIDENT = 4
"""Such programs for each processor, as many as shared memory holds with 16-bit weights; they share the rows equally."""
ELEMENTS_PER_WARP = 1024


def triton_entered(
    stream: Stream,
    weights: Sequence[Tensor],
    *,
    gain: Gain | None = None,
    biases: Sequence[Tensor] | None = None,
    gate: Activation | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The contract of `longread.ops.gemv.entered`, for matrices that meet one vector each."""
    total = stream.x if stream.added is None else torch.empty_like(stream.x, memory_format=torch.contiguous_format)
    sizes = [w.shape[-2] for w in weights[:1] if gate is not None] or [w.shape[-2] for w in weights]
    out = torch.empty(len(stream.x), sum(sizes), device=stream.x.device, dtype=stream.x.dtype)
    _launch(stream, total, weights, out, gain, biases, gate)
    return total, out.split(sizes, dim=1)


def triton_gemv(x: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The contract of `longread.ops.gemv.gemv`, for a matrix that meets one vector."""
    out = torch.empty(len(x), weight.shape[-2], device=x.device, dtype=dtype or x.dtype)
    _launch(Stream(x), x, (weight,), out, None, None, None)
    return out


def _launch(
    stream: Stream,
    total: Tensor,
    weights: Sequence[Tensor],
    out: Tensor,
    gain: Gain | None,
    biases: Sequence[Tensor] | None,
    gate: Activation | None,
) -> None:
    x, added = stream.x.contiguous(), stream.x if stream.added is None else stream.added.contiguous()
    B, D = x.shape
    width, together = triton.next_power_of_2(D), 1 if gate is None else 2
    sizes = [w.shape[-2] for w in weights[: len(weights) // together]]
    large = sum(w.nbytes for w in weights) >= LARGE
    rows = max(1, (ELEMENTS_AT_A_TIME if large else ELEMENTS) // (width * together))
    while rows > 1 and B * sum(triton.cdiv(size, rows) for size in sizes) < PROGRAMS:
        rows //= 2
    tiles = sum(triton.cdiv(size, rows) for size in sizes)
    most_warps = MOST_LOOPING_WARPS if large else MOST_WARPS
    programs = triton.cdiv(tiles, triton.cdiv(tiles * B, RESIDENT * processors(x))) if large else tiles
    # what is absent is stood for by what the kernel then does not read there
    three = [*weights, *[weights[0]] * (3 - len(weights))]
    missing = Gain(x, 1.0)
    after, before = stream.gain or missing, gain or missing
    _gemv[(programs, B)](
        x, added, after.weight, before.weight, total, out,
        *three,
        *(biases or [x] * 3), *[x] * (3 - len(biases or three)),
        *(sizes + [0] * (3 - len(sizes))),
        *(w.stride(0) if w.dim() == 3 else 0 for w in three),
        after.eps, before.eps, tiles,
        D=D, WIDTH=width, ROWS=rows, MATRICES=len(sizes),
        ADD=stream.added is not None, NORM_ADDED=stream.gain is not None, NORM=gain is not None,
        BIAS=biases is not None, GATE=gate is not None, GELU=gate == "gelu_tanh",
        STAGES=STAGES if large else 0,
        num_warps=min(most_warps, max(1, rows * width * together // ELEMENTS_PER_WARP)),
    )  # fmt: skip


@triton.jit
def _place(
    tile, b, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, size_0, size_1, size_2, batch_0, batch_1, batch_2,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
):  # fmt: skip
    """Of a tile of ROWS rows: where they lie in their matrix and their biases, and where their products belong."""
    weight, bias, size, first_out = weight_0 + b * batch_0, bias_0, size_0, 0
    if MATRICES > 1:
        tiles = tl.cdiv(size_0, ROWS)
        if tile >= tiles:
            weight, bias, size, first_out = weight_1 + b * batch_1, bias_1, size_1, size_0
            tile -= tiles
            if MATRICES > 2:
                tiles = tl.cdiv(size_1, ROWS)
                if tile >= tiles:
                    weight, bias, size, first_out = weight_2 + b * batch_2, bias_2, size_2, size_0 + size_1
                    tile -= tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * D + tl.arange(0, WIDTH)[None, :]
    return weight + at, at, bias + row, row < size, first_out + row


@triton.jit(do_not_specialize=["tiles"])
def _gemv(
    x, added, gain_after, gain_before, total, out,
    weight_0, weight_1, weight_2, bias_0, bias_1, bias_2,
    size_0, size_1, size_2, batch_0, batch_1, batch_2, eps_after, eps_before, tiles,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
    ADD: tl.constexpr, NORM_ADDED: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one sequence, tiles of ROWS rows of one of its matrices, or with a gate of both."""
    b = tl.program_id(1).to(tl.int64)
    first, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < D
    weight, at, bias, there, product_at = _place(
        first, b, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2,
        size_0, size_1, size_2, batch_0, batch_1, batch_2, D, WIDTH, ROWS, MATRICES,
    )  # fmt: skip
    read = there[:, None] & inside
    w = tl.load(weight, read, 0.0, eviction_policy="evict_first")
    up = w
    if GATE:
        up = tl.load(weight_1 + b * batch_1 + at, read, 0.0, eviction_policy="evict_first")
    if NORM_ADDED:
        after = load_wide(gain_after, column, inside)
    if NORM:
        before = load_wide(gain_before, column, inside)
    v = load_wide(x, b * D + column, inside)
    if ADD:
        y = load_wide(added, b * D + column, inside)
        if NORM_ADDED:
            y = y * tl.rsqrt(tl.sum(y * y, 1) / D + eps_after)[:, None] * after
        v += y
        if first == 0:
            tl.store(total + b * D + column, v, inside)
    if NORM:
        v = v * tl.rsqrt(tl.sum(v * v, 1) / D + eps_before)[:, None] * before
    out += b * (size_0 + size_1 + size_2)
    if STAGES:
        for tile in tl.range(first + programs, tiles, programs, num_stages=STAGES):
            weight, at, next_bias, next_there, next_product_at = _place(
                tile, b, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2,
                size_0, size_1, size_2, batch_0, batch_1, batch_2, D, WIDTH, ROWS, MATRICES,
            )  # fmt: skip
            read = next_there[:, None] & inside
            next_w = tl.load(weight, read, 0.0, eviction_policy="evict_first")
            next_up = next_w
            if GATE:
                next_up = tl.load(weight_1 + b * batch_1 + at, read, 0.0, eviction_policy="evict_first")
            _multiply(
                next_w, next_up, v, next_bias, bias_1 + next_product_at, next_there, out + next_product_at,
                BIAS, GATE, GELU,
            )  # fmt: skip
    _multiply(w, up, v, bias, bias_1 + product_at, there, out + product_at, BIAS, GATE, GELU)


@triton.jit
def _multiply(w, up, v, bias, up_bias, there, out, BIAS: tl.constexpr, GATE: tl.constexpr, GELU: tl.constexpr):
    """Writes down the products of a tile's rows."""
    product = tl.sum(w.to(tl.float32) * v, 1)
    if BIAS:
        product += tl.load(bias, there, 0.0).to(tl.float32)
    if GATE:
        up_product = tl.sum(up.to(tl.float32) * v, 1)
        if BIAS:
            up_product += tl.load(up_bias, there, 0.0).to(tl.float32)
        product = product * gate_sigmoid(product, GELU) * up_product
    tl.store(out, product, there)
