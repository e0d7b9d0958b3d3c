"""The gate on a GPU: each derivative one pass in float32, with the formulas of explicit.py.

Inputs may be rows with gaps between them, such as the two halves of one product. So may the first two outputs, the
adjoints of such halves; others are contiguous. What the second derivative leaves for a and b is added in the pass of
the first (`longread.ops.needed`).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import handed_on
from longread.ops.precompile import settle_names
from longread.ops.swiglu import explicit
from longread.ops.swiglu.reference import Activation

BLOCK, WARPS = 2048, 4
TWICE_KAPPA, CUBIC = tl.constexpr(explicit.TWICE_KAPPA), tl.constexpr(explicit.CUBIC)


def triton_swiglu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.swiglu.swiglu`."""
    return _Gate.apply(gate, up, activation)[0]


def triton_swiglu_of_halves(both: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.swiglu.swiglu_of_halves`."""
    return _GateOfHalves.apply(both, activation)[0]


def _launch(
    kernel: Any,
    inputs: tuple[Tensor, ...],
    outputs: int,
    activation: Activation,
    *,
    given: tuple[Tensor, ...] = (),
    **constants: bool,
) -> tuple[Tensor, ...]:
    """Runs an elementwise kernel over inputs of one shape; returns its outputs, new but for the two halves `given`."""
    shape = inputs[0].shape
    new = (torch.empty(shape, device=inputs[0].device, dtype=inputs[0].dtype) for _ in range(outputs - len(given)))
    made = (*given, *new)
    if not inputs[0].numel():
        return made
    matrices = [_as_matrix(x) for x in inputs]
    count, columns = matrices[0].shape
    distance = 2 * columns if given else columns
    if not given and all(x.is_contiguous() for x in matrices):
        matrices = [x.view(1, -1) for x in matrices]
        count, columns = 1, count * columns
    blocks = triton.cdiv(columns, BLOCK)
    kernel[(blocks * count,)](
        *matrices,
        *made,
        columns,
        blocks,
        *(x.stride(0) for x in matrices),
        *((distance,) if outputs > 1 else ()),
        BLOCK=BLOCK,
        GELU=activation == "gelu_tanh",
        **constants,
        num_warps=WARPS,
    )
    return made


def _first(
    inputs: tuple[Tensor, ...], left: tuple[Tensor, ...], activation: Activation, given: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """(a, b, dh) -> (da, db), added to what the second derivative left for both, if it did."""
    # absent tensors are stood for by a and b, which the kernel then does not read again
    inputs = *inputs, *(left or inputs[:2])
    return _launch(_swiglu_backward, inputs, 2, activation, given=given, ADDED=bool(left))


def _as_matrix(x: Tensor) -> Tensor:
    """[..., F] as [rows, F], copied only if its rows have no common distance."""
    try:
        matrix = x.view(-1, x.shape[-1])
    except RuntimeError:
        matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


class _Gate(torch.autograd.Function):
    """(a, b) -> (h; a and b for `_GateGradient`)"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, activation: Activation) -> tuple[Tensor, ...]:
        read = handed_on(ctx, a, b)
        ctx.save_for_backward(*read)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return _launch(_swiglu_forward, (a, b), 1, activation)[0], *read

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, *left: Tensor | None) -> tuple[Tensor | None, ...]:
        if dh is None:
            return *left, None
        inputs, any_left = (*ctx.saved_tensors, dh), any(x is not None for x in left)
        if not torch.is_grad_enabled():
            # nothing is left for the one of a and b that takes no gradient
            known = tuple(torch.zeros_like(dh) if x is None else x for x in left) if any_left else ()
            return *_first(inputs, known, ctx.activation), None
        found = _GateGradient.apply(*inputs, ctx.activation)
        return *(x if more is None else x + more for x, more in zip(found, left, strict=True)), None


class _GateGradient(torch.autograd.Function):
    """(a, b, dh) -> (da, db)"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dh: Tensor, activation: Activation) -> tuple[Tensor, ...]:
        ctx.save_for_backward(a, b, dh)
        ctx.activation = activation
        return _first((a, b, dh), (), activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        return *_launch(_swiglu_second, (*ctx.saved_tensors, u, v), 3, ctx.activation), None


class _GateOfHalves(torch.autograd.Function):
    """a and b -> (h; both for `_GateGradientOfHalves`)"""

    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
        (read,) = handed_on(ctx, both)
        ctx.save_for_backward(read)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return _launch(_swiglu_forward, _halves(both), 1, activation)[0], read

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, None]:
        if dh is None:
            return left, None
        (both,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _first_of_halves(both, dh, left, ctx.activation), None
        found = _GateGradientOfHalves.apply(both, dh, ctx.activation)
        return found if left is None else found + left, None


class _GateGradientOfHalves(torch.autograd.Function):
    """(a and b, dh) -> da and db"""

    @staticmethod
    def forward(ctx: Any, both: Tensor, dh: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(both, dh)
        ctx.activation = activation
        return _first_of_halves(both, dh, None, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor, None]:
        both, dh = ctx.saved_tensors
        out = torch.empty(both.shape, device=both.device, dtype=both.dtype)
        inputs = *_halves(both), dh, *_halves(u)
        *_, dh_hat = _launch(_swiglu_second, inputs, 3, ctx.activation, given=_halves(out))
        return out, dh_hat, None


def _first_of_halves(both: Tensor, dh: Tensor, left: Tensor | None, activation: Activation) -> Tensor:
    out = torch.empty(both.shape, device=both.device, dtype=both.dtype)
    _first((*_halves(both), dh), () if left is None else _halves(left), activation, given=_halves(out))
    return out


def _halves(both: Tensor) -> tuple[Tensor, ...]:
    return both.chunk(2, dim=-1)


@triton.jit
def _place(columns, blocks, BLOCK: tl.constexpr):
    """The row of this program, its columns in that row and which of these exist, and its place in a dense output."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns, row * columns + column


@triton.jit
def gate_sigmoid(a, GELU: tl.constexpr):
    """σ"""
    if GELU:
        a = TWICE_KAPPA * (a + CUBIC * a * a * a)
    return tl.sigmoid(a)


@triton.jit
def _slope(a, sigmoid, GELU: tl.constexpr):
    """s'"""
    bump = sigmoid * (1 - sigmoid)
    if GELU:
        bump *= TWICE_KAPPA * (1 + 3 * CUBIC * a * a)
    return sigmoid + bump * a


@triton.jit
def _bend(a, sigmoid, GELU: tl.constexpr):
    """s''"""
    inside = 2 + a * (1 - 2 * sigmoid)
    if GELU:
        steep = TWICE_KAPPA * (1 + 3 * CUBIC * a * a)
        inside = 2 * steep + a * (6 * TWICE_KAPPA * CUBIC * a + steep * steep * (1 - 2 * sigmoid))
    return sigmoid * (1 - sigmoid) * inside


@triton.jit(do_not_specialize_on_alignment=["blocks"])
def _swiglu_forward(a_ptr, b_ptr, h_ptr, columns, blocks, a_stride, b_stride, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row, column, inside, out = _place(columns, blocks, BLOCK)
    a = tl.load(a_ptr + row * a_stride + column, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside).to(tl.float32)
    tl.store(h_ptr + out, a * gate_sigmoid(a, GELU) * b, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["blocks"])
def _swiglu_backward(
    a_ptr,
    b_ptr,
    dh_ptr,
    a_left_ptr,
    b_left_ptr,
    da_ptr,
    db_ptr,
    columns,
    blocks,
    a_stride,
    b_stride,
    dh_stride,
    a_left_stride,
    b_left_stride,
    pair_stride,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    ADDED: tl.constexpr,
):
    row, column, inside, _ = _place(columns, blocks, BLOCK)
    out = row * pair_stride + column
    a = tl.load(a_ptr + row * a_stride + column, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside).to(tl.float32)
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside).to(tl.float32)
    sigmoid = gate_sigmoid(a, GELU)
    da = _slope(a, sigmoid, GELU) * b * dh
    db = sigmoid * a * dh
    if ADDED:
        da += tl.load(a_left_ptr + row * a_left_stride + column, mask=inside).to(tl.float32)
        db += tl.load(b_left_ptr + row * b_left_stride + column, mask=inside).to(tl.float32)
    tl.store(da_ptr + out, da, mask=inside)
    tl.store(db_ptr + out, db, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["blocks"])
def _swiglu_second(
    a_ptr,
    b_ptr,
    dh_ptr,
    u_ptr,
    v_ptr,
    a_hat_ptr,
    b_hat_ptr,
    dh_hat_ptr,
    columns,
    blocks,
    a_stride,
    b_stride,
    dh_stride,
    u_stride,
    v_stride,
    pair_stride,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    row, column, inside, out = _place(columns, blocks, BLOCK)
    a = tl.load(a_ptr + row * a_stride + column, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside).to(tl.float32)
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + column, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + row * v_stride + column, mask=inside).to(tl.float32)
    sigmoid = gate_sigmoid(a, GELU)
    slope = _slope(a, sigmoid, GELU)
    bend = _bend(a, sigmoid, GELU)
    pair = row * pair_stride + column
    tl.store(a_hat_ptr + pair, dh * (bend * b * u + slope * v), mask=inside)
    tl.store(b_hat_ptr + pair, dh * slope * u, mask=inside)
    tl.store(dh_hat_ptr + out, slope * b * u + sigmoid * a * v, mask=inside)


settle_names(globals())
