"""One kernel from a residual stream to the products of its next sub-layer; bound by reading the matrices.

A program holds whole rows of a matrix and the whole vector. It asks for its rows first and computes the norms, every
program for itself, while they are on their way; the first writes the stream down. Sums are in one order, so they are
the same in every run.
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
from longread.ops.tiles import load_wide

ELEMENTS = 32_768
"""Of matrices in a program: enough bytes on their way to keep the memory busy."""
PROGRAMS = 512
"""A smaller matrix is divided among so many programs at least, a few for each processor."""
ELEMENTS_PER_WARP, MOST_WARPS = 1024, 8


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
    rows = max(1, ELEMENTS // (width * together))
    while rows > 1 and B * sum(triton.cdiv(size, rows) for size in sizes) < PROGRAMS:
        rows //= 2
    # what is absent is stood for by what the kernel then does not read there
    three = [*weights, *[weights[0]] * (3 - len(weights))]
    missing = Gain(x, 1.0)
    after, before = stream.gain or missing, gain or missing
    _gemv[(sum(triton.cdiv(size, rows) for size in sizes), B)](
        x, added, after.weight, before.weight, total, out,
        *three,
        *(biases or [x] * 3), *[x] * (3 - len(biases or three)),
        *(sizes + [0] * (3 - len(sizes))),
        *(w.stride(0) if w.dim() == 3 else 0 for w in three),
        after.eps, before.eps,
        D=D, WIDTH=width, ROWS=rows, MATRICES=len(sizes),
        ADD=stream.added is not None, NORM_ADDED=stream.gain is not None, NORM=gain is not None,
        BIAS=biases is not None, GATE=gate is not None, GELU=gate == "gelu_tanh",
        num_warps=min(MOST_WARPS, max(1, rows * width * together // ELEMENTS_PER_WARP)),
    )  # fmt: skip


@triton.jit
def _gemv(
    x, added, gain_after, gain_before, total, out,
    weight_0, weight_1, weight_2, bias_0, bias_1, bias_2,
    size_0, size_1, size_2, batch_0, batch_1, batch_2, eps_after, eps_before,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
    ADD: tl.constexpr, NORM_ADDED: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Of one sequence, ROWS rows of one of its matrices, or with a gate of both."""
    b = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0)
    weight, bias, size, first_out = weight_0 + b * batch_0, bias_0, size_0, 0
    if MATRICES > 1:
        programs = tl.cdiv(size_0, ROWS)
        if index >= programs:
            weight, bias, size, first_out = weight_1 + b * batch_1, bias_1, size_1, size_0
            index -= programs
            if MATRICES > 2:
                programs = tl.cdiv(size_1, ROWS)
                if index >= programs:
                    weight, bias, size, first_out = weight_2 + b * batch_2, bias_2, size_2, size_0 + size_1
                    index -= programs
    row, column = index * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    inside, there = column < D, row < size
    at = row.to(tl.int64)[:, None] * D + column
    read = there[:, None] & inside
    w = tl.load(weight + at, read, 0.0, eviction_policy="evict_first")
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
        if tl.program_id(0) == 0:
            tl.store(total + b * D + column, v, inside)
    if NORM:
        v = v * tl.rsqrt(tl.sum(v * v, 1) / D + eps_before)[:, None] * before
    product = tl.sum(w.to(tl.float32) * v, 1)
    if BIAS:
        product += tl.load(bias + row, there, 0.0).to(tl.float32)
    if GATE:
        up_product = tl.sum(up.to(tl.float32) * v, 1)
        if BIAS:
            up_product += tl.load(bias_1 + row, there, 0.0).to(tl.float32)
        product = product * gate_sigmoid(product, GELU) * up_product
    tl.store(out + b * (size_0 + size_1 + size_2) + first_out + row, product, there)
