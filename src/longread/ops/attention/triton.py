# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: RET505 (Triton wants an else after a return that is chosen when compiling)
"""Windowed causal attention with a cached past for NVIDIA GPUs: forward, backward and second order, memory O(T).

Six kernels, each a sweep over the keys of a block of queries or over the queries of a block of keys. With
S = σ q kᵀ, P = softmax(S), o = P v, δ = ⟨do, o⟩ and dS = P∘(do vᵀ − δ), the gradients are dq = σ dS k,
dk = σ dSᵀ q and dv = Pᵀ do. Cotangents a, b, c of these give the derivative of the gradient:

    Ṡ = σ (a kᵀ + q bᵀ)      r = ⟨P, Ṡ⟩      ȯ = (P∘Ṡ) v − r∘o + P c, the cotangent of do      φ = ⟨do, ȯ⟩
    Ŝ = P∘[(do vᵀ − δ)∘(Ṡ − r) + do cᵀ − φ]
    q̂ = σ (Ŝ k + dS b)       k̂ = σ (Ŝᵀ q + dSᵀ a)       v̂ = (P∘(Ṡ − r))ᵀ do

Queries and their own keys have positions 0 … T − 1, the past has −P … −1. The two ranges of keys are swept one after
the other: b and c are usually given for own keys alone, since the inner gradient takes the past for a constant.
Within each, blocks that are visible throughout are swept without a mask.

A head of 80 or 96 is 64 + 16 or 64 + 32: a tile is a tuple of one or two parts whose widths are powers of two, and
every product is one instruction a part. Tiles are moved by tensor descriptors: rows beyond the end read as zeros and
are not written, so only probabilities need masks.

What the second derivative leaves for an input is added in the pass of the first (`longread.ops.needed`).

Where heads share keys and values, a sweep over keys reads those of its head's group, and a program that has a block of
keys sweeps over the queries of the whole group: its sums are complete, in an order that is always the same.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from longread.ops.attention.hopper import overlaps
from longread.ops.needed import handed_on, needed_inputs
from longread.ops.precompile import settle_names


class Blocks(NamedTuple):
    """How a kernel cuts its work."""

    queries: int
    keys: int
    warps: int
    stages: int


FLOAT32 = Blocks(16, 16, 8, 1)
"""For float32, whose products stay off the tensor cores, in every kernel."""

_SMALL = Blocks(64, 64, 4, 3)
TABLE: dict[str, dict[int, Blocks]] = {
    "forward": {64: _SMALL, 80: Blocks(128, 64, 4, 3), 96: Blocks(64, 128, 4, 2), 128: Blocks(128, 64, 8, 2)},
    "query_gradient": {64: _SMALL, 80: Blocks(128, 64, 8, 3), 96: _SMALL, 128: Blocks(128, 64, 8, 2)},
    "key_gradient": {64: _SMALL, 80: _SMALL, 96: _SMALL, 128: Blocks(64, 128, 8, 2)},
    "tangent": {
        64: Blocks(64, 32, 4, 3),
        80: Blocks(128, 32, 8, 3),
        96: Blocks(128, 64, 8, 3),
        128: Blocks(128, 64, 8, 2),
    },
    "query_second": {80: Blocks(64, 64, 4, 2), 96: Blocks(128, 64, 8, 2), 128: Blocks(128, 32, 8, 2)},
    "key_second": {96: Blocks(64, 64, 4, 2), 128: Blocks(32, 128, 8, 2)},
}
"""For 16-bit types: kernel -> largest head dim -> blocks. `benchmarks/gpu_attention.py` measures others beside them."""


def blocks_of(kernel: str, head_dim: int, itemsize: int) -> Blocks:
    """Those of a kernel named in `TABLE`."""
    if itemsize > 2:
        return FLOAT32
    return next(blocks for largest, blocks in TABLE[kernel].items() if head_dim <= largest)


LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are powers of two inside the kernels, and so is the saved log-sum-exp."""


# Tiles: tuples of one or two parts [rows, width].


@triton.jit
def _parts(first, second):
    if second is None:
        return (first,)
    else:
        return (first, second)


@triton.jit
def _with_tangents(k0, k1, v0, v1, b0, b1, c0, c1):
    if b0 is None:
        return (_parts(k0, k1), _parts(v0, v1))
    else:
        return (_parts(k0, k1), _parts(v0, v1), _parts(b0, b1), _parts(c0, c1))


@triton.jit
def _load_part(descriptor, b, n, row, column):
    return descriptor.load([b, n, row, column]).reshape(descriptor.block_shape[2], descriptor.block_shape[3])


@triton.jit
def _load_row(descriptor, b, n, first):
    """One number for each query, beside keys that stand in rows."""
    return descriptor.load([b, n, first]).reshape(descriptor.block_shape[2])[None, :]


@triton.jit
def _load(descriptors, b, n, row):
    if len(descriptors) == 1:
        return (_load_part(descriptors[0], b, n, row, 0),)
    else:
        return (
            _load_part(descriptors[0], b, n, row, 0),
            _load_part(descriptors[1], b, n, row, descriptors[0].block_shape[3]),
        )


@triton.jit
def _store_part(descriptor, b, n, row, column, x):
    shape: tl.constexpr = descriptor.block_shape
    descriptor.store([b, n, row, column], x.to(descriptor.dtype).reshape(1, 1, shape[2], shape[3]))


@triton.jit
def _store(descriptors, b, n, row, x):
    _store_part(descriptors[0], b, n, row, 0, x[0])
    if len(descriptors) == 2:
        _store_part(descriptors[1], b, n, row, descriptors[0].block_shape[3], x[1])


@triton.jit
def _zeros_part(rows: tl.constexpr, width: tl.constexpr):
    return tl.zeros([rows, width], tl.float32)


@triton.jit
def _zeros(rows: tl.constexpr, descriptors):
    if len(descriptors) == 1:
        return (_zeros_part(rows, descriptors[0].block_shape[3]),)
    else:
        return (
            _zeros_part(rows, descriptors[0].block_shape[3]),
            _zeros_part(rows, descriptors[1].block_shape[3]),
        )


@triton.jit
def _scores(x, y, total):
    """total + x yᵀ"""
    total = tl.dot(x[0], y[0].T, total, input_precision="ieee")
    if len(x) == 2:
        total = tl.dot(x[1], y[1].T, total, input_precision="ieee")
    return total


@triton.jit
def _mix(total, weights, x):
    """total + weights x"""
    weights = weights.to(x[0].dtype)
    if len(x) == 1:
        return (tl.dot(weights, x[0], total[0], input_precision="ieee"),)
    else:
        return (
            tl.dot(weights, x[0], total[0], input_precision="ieee"),
            tl.dot(weights, x[1], total[1], input_precision="ieee"),
        )


@triton.jit
def _scale(x, by):
    if len(x) == 1:
        return (x[0] * by,)
    else:
        return (x[0] * by, x[1] * by)


@triton.jit
def _plus(x, more0, more1, b, n, row):
    """x + the tile of a tensor, if there is one."""
    if more0 is None:
        return x
    else:
        more = _load(_parts(more0, more1), b, n, row)
        if len(x) == 1:
            return (x[0] + more[0].to(tl.float32),)
        else:
            return (x[0] + more[0].to(tl.float32), x[1] + more[1].to(tl.float32))


@triton.jit
def _minus(x, by, y):
    """x − by∘y with a factor for each row."""
    if len(x) == 1:
        return (x[0] - by[:, None] * y[0].to(tl.float32),)
    else:
        return (x[0] - by[:, None] * y[0].to(tl.float32), x[1] - by[:, None] * y[1].to(tl.float32))


@triton.jit
def _row_products(x, y):
    """⟨x, y⟩ of each row."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if len(x) == 2:
        total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
    return total


# A sweep: a tile that stays, tiles that move past it, and a step that meets each of them. Where a tile of keys stays,
# the queries of all GROUP heads that share it move past, position after position. Divisions round towards zero, so they
# get nothing negative.


@triton.jit
def _sweep(
    step: tl.constexpr, state, staying, moving, b, n, start, end, shift, position, oldest, window, scale,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, KEYS_MOVE: tl.constexpr, CAUSAL: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    if GROUP == 1:
        for first in tl.range(start, end, BLOCK):
            state = _meet(
                step, state, staying, moving, b, n, first, shift, position, oldest, window, scale,
                BLOCK, KEYS_MOVE, CAUSAL, CLIPPED,
            )  # fmt: skip
    else:
        for index in tl.range(0, tl.cdiv(tl.maximum(end - start, 0), BLOCK) * GROUP):
            state = _meet(
                step, state, staying, moving, b, n * GROUP + index % GROUP, start + index // GROUP * BLOCK,
                shift, position, oldest, window, scale, BLOCK, KEYS_MOVE, CAUSAL, CLIPPED,
            )  # fmt: skip
    return state


@triton.jit
def _meet(
    step: tl.constexpr, state, staying, moving, b, n, first, shift, position, oldest, window, scale,
    BLOCK: tl.constexpr, KEYS_MOVE: tl.constexpr, CAUSAL: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    visible = None
    if CAUSAL or CLIPPED:
        other = first + tl.arange(0, BLOCK)
        if KEYS_MOVE:
            query, key = position[:, None], other[None, :]
        else:
            query, key = other[None, :], position[:, None]
        if CAUSAL and CLIPPED:
            visible = (key <= query) & (key > query - window)
        elif CAUSAL:
            visible = key <= query
        else:
            visible = (key > query - window) & (key >= oldest)
    return step(state, staying, moving, b, n, first + shift, visible, scale, BLOCK)


@triton.jit
def _over_keys(
    step: tl.constexpr, state, staying, own, past, b, n, first_query, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """From the oldest visible key of a block of queries to the newest; blocks of the past end at position 0."""
    g = n // GROUP
    query = first_query + tl.arange(0, QUERIES)
    if PAST:
        reach = tl.minimum(P, tl.maximum(window - 1 - first_query, 0))
        full_reach = tl.minimum(P, tl.maximum(window - first_query - QUERIES, 0))
        start, full_start = -tl.cdiv(reach, KEYS) * KEYS, -(full_reach // KEYS * KEYS)
        state = _sweep(
            step, state, staying, past, b, g, start, full_start, P, query, -P, window, scale,
            KEYS, 1, True, False, True,
        )  # fmt: skip
        state = _sweep(
            step, state, staying, past, b, g, full_start, 0, P, query, -P, window, scale,
            KEYS, 1, True, False, False,
        )  # fmt: skip
    full_start = 0
    full_end = (first_query + 1) // KEYS * KEYS
    if CLIPPED:
        start = tl.maximum(first_query - window + 1, 0) // KEYS * KEYS
        full_start = tl.minimum(tl.cdiv(tl.maximum(first_query + QUERIES - window, 0), KEYS) * KEYS, full_end)
        state = _sweep(
            step, state, staying, own, b, g, start, full_start, 0, query, 0, window, scale,
            KEYS, 1, True, False, True,
        )  # fmt: skip
    state = _sweep(
        step, state, staying, own, b, g, full_start, full_end, 0, query, 0, window, scale,
        KEYS, 1, True, False, False,
    )  # fmt: skip
    end = tl.minimum(T, first_query + QUERIES)
    return _sweep(
        step, state, staying, own, b, g, full_end, end, 0, query, 0, window, scale,
        KEYS, 1, True, True, CLIPPED,
    )  # fmt: skip


@triton.jit
def _over_queries(
    step: tl.constexpr, state, staying, moving, b, g, first_key, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, OWN: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """All queries that see a block of keys. Queries from T on are zeros, which add nothing.

    Blocks without a mask come first: the other order makes ptxas run the products of all sweeps one after the other.
    """
    key = first_key + tl.arange(0, KEYS)
    start = 0
    full_start = 0
    full_end = T
    end = T
    if CLIPPED:
        end = tl.minimum(T, tl.maximum(first_key + KEYS - 1 + window, 0))
        full_end = tl.where(first_key + window >= T, end, tl.maximum(first_key + window, 0) // QUERIES * QUERIES)
    if OWN:
        start = first_key // QUERIES * QUERIES
        full_start = tl.minimum(tl.cdiv(first_key + KEYS - 1, QUERIES) * QUERIES, end)
    full_end = tl.maximum(full_start, full_end)
    state = _sweep(
        step, state, staying, moving, b, g, full_start, full_end, 0, key, 0, window, scale,
        QUERIES, GROUP, False, False, False,
    )  # fmt: skip
    if OWN:
        state = _sweep(
            step, state, staying, moving, b, g, start, full_start, 0, key, 0, window, scale,
            QUERIES, GROUP, False, True, CLIPPED,
        )  # fmt: skip
    if CLIPPED:
        state = _sweep(
            step, state, staying, moving, b, g, full_end, end, 0, key, -P, window, scale,
            QUERIES, GROUP, False, False, True,
        )  # fmt: skip
    return state


@triton.jit
def _probabilities(s, lse, visible, scale):
    p = tl.exp2(s * (scale * LOG2E) - lse)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _row_length(T):
    """Of the memory of one number a query: descriptors want rows to start at multiples of 16 bytes."""
    return tl.cdiv(T, 4) * 4


@triton.jit
def _position(QUERIES: tl.constexpr):
    """Sequence, head, and first query of this program: the longest sweeps are started first."""
    return tl.program_id(2), tl.program_id(1), (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES


# Forward. Normed queries and keys bound their scores: then the running maximum, and an eighth of the time, can be left
# out. Only the GPU knows the bound, so both kernels are launched, and one of them returns at once. On a Hopper GPU the
# one for normed queries and keys is that of overlapped.py.

LARGEST_BOUND = tl.constexpr(60.0)
"""At which even the smallest possible exp2 is a normal float32 or bfloat16. In float16, where probabilities meet
values, it would be zero from 25 on, so there the maximum runs."""


@triton.jit
def _forward_step(state, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    out, highest, total = state
    keys, values = moving
    s = _scores(staying[0], _load(keys, b, n, row), None)
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1) * (scale * LOG2E))
    p = tl.exp2(s * (scale * LOG2E) - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(p, 1)
    out = _mix(_scale(out, shrink[:, None]), p, _load(values, b, n, row))
    return out, higher, total


@triton.jit
def _bounded_step(state, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    """The same where `highest` is known to be above every score from the beginning."""
    out, highest, total = state
    keys, values = moving
    s = _scores(staying[0], _load(keys, b, n, row), None)
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    p = tl.exp2(s * (scale * LOG2E) - highest[:, None])
    return _mix(out, p, _load(values, b, n, row)), highest, total + tl.sum(p, 1)


@triton.jit
def _largest(pointer, H: tl.constexpr):
    column = tl.arange(0, 128)
    return tl.max(tl.abs(tl.load(pointer + column, column < H, 0.0).to(tl.float32)), 0)


@triton.jit(do_not_specialize=["T", "P", "window"])
def _forward_kernel(
    q0, q1, o0, o1, k0, k1, v0, v1, pk0, pk1, pv0, pv1, lse, query_gain, key_gain, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, CLIPPED: tl.constexpr,
    H: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    b, n, first_query = _position(QUERIES)
    query = first_query + tl.arange(0, QUERIES)
    outputs = _parts(o0, o1)
    staying = (_load(_parts(q0, q1), b, n, first_query),)
    own, past = (_parts(k0, k1), _parts(v0, v1)), (_parts(pk0, pk1), _parts(pv0, pv1))
    # The highest score starts finite: a row that sees nothing in its first blocks must not subtract infinities.
    highest = -1e30
    if query_gain is not None:
        bound = H * scale * LOG2E * _largest(query_gain, H) * _largest(key_gain, H)
        if (bound <= LARGEST_BOUND) != BOUNDED:
            return  # the other kernel does it
        if BOUNDED:
            highest = bound
    state = (_zeros(QUERIES, outputs), tl.zeros([QUERIES], tl.float32) + highest, tl.zeros([QUERIES], tl.float32))
    out, highest, total = _over_keys(
        _bounded_step if BOUNDED else _forward_step, state, staying, own, past, b, n, first_query, T, P, window, scale,
        QUERIES, KEYS, GROUP, PAST, CLIPPED,
    )  # fmt: skip
    _store(outputs, b, n, first_query, _scale(out, 1 / total[:, None]))
    tl.store(lse + (b * tl.num_programs(1) + n) * _row_length(T) + query, highest + tl.log2(total), query < T)


# First derivative. The sweep over keys runs first and leaves δ for the sweep over queries.


@triton.jit
def _query_gradient_step(dq, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    q, do, lse, delta = staying
    keys, values = moving
    k = _load(keys, b, n, row)
    p = _probabilities(_scores(q, k, None), lse[:, None], visible, scale)
    dp = _scores(do, _load(values, b, n, row), None)
    return _mix(dq, p * (dp - delta[:, None]), k)


@triton.jit(do_not_specialize=["T", "P", "window"])
def _query_gradient_kernel(
    q0, q1, o0, o1, do0, do1, dq0, dq1, left0, left1, k0, k1, v0, v1, pk0, pk1, pv0, pv1,
    lse, delta, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    b, n, first_query = _position(QUERIES)
    query = first_query + tl.arange(0, QUERIES)
    at = (b * tl.num_programs(1) + n) * _row_length(T) + query
    outputs = _parts(dq0, dq1)
    q, do = _load(_parts(q0, q1), b, n, first_query), _load(_parts(do0, do1), b, n, first_query)
    inner = _row_products(_load(_parts(o0, o1), b, n, first_query), do)
    tl.store(delta + at, inner, query < T)
    staying = (q, do, tl.load(lse + at, query < T, 0.0), inner)
    own, past = (_parts(k0, k1), _parts(v0, v1)), (_parts(pk0, pk1), _parts(pv0, pv1))
    dq = _over_keys(
        _query_gradient_step, _zeros(QUERIES, outputs), staying, own, past, b, n, first_query, T, P, window, scale,
        QUERIES, KEYS, GROUP, PAST, CLIPPED,
    )  # fmt: skip
    _store(outputs, b, n, first_query, _plus(_scale(dq, scale), left0, left1, b, n, first_query))


@triton.jit
def _key_gradient_step(state, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    dk, dv = state
    k, v = staying
    queries, d_outputs, lse, delta = moving
    q, do = _load(queries, b, n, row), _load(d_outputs, b, n, row)
    p = _probabilities(_scores(k, q, None), _load_row(lse, b, n, row), visible, scale)
    dv = _mix(dv, p, do)
    dp = _scores(v, do, None) - _load_row(delta, b, n, row)
    return _mix(dk, p * dp, q), dv


@triton.jit(do_not_specialize=["T", "P", "window"])
def _key_gradient_kernel(
    q0, q1, do0, do1, k0, k1, v0, v1, dk0, dk1, dv0, dv1, k_left0, k_left1, v_left0, v_left1,
    lse, delta, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, OWN: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """Of own keys, or with OWN False of the past, where k0 … dv1 and the rows of the grid are the past's."""
    b, g, first = tl.program_id(2), tl.program_id(1), tl.program_id(0) * KEYS
    shift = 0 if OWN else P
    key_outputs, value_outputs = _parts(dk0, dk1), _parts(dv0, dv1)
    staying = (_load(_parts(k0, k1), b, g, first), _load(_parts(v0, v1), b, g, first))
    moving = (_parts(q0, q1), _parts(do0, do1), lse, delta)
    state = (_zeros(KEYS, key_outputs), _zeros(KEYS, value_outputs))
    dk, dv = _over_queries(
        _key_gradient_step, state, staying, moving, b, g, first - shift, T, P, window, scale,
        QUERIES, KEYS, GROUP, OWN, CLIPPED,
    )  # fmt: skip
    _store(key_outputs, b, g, first, _plus(_scale(dk, scale), k_left0, k_left1, b, g, first))
    _store(value_outputs, b, g, first, _plus(dv, v_left0, v_left1, b, g, first))


# Second derivative: r, ȯ and φ first, then what they make of the queries, and of the keys and values. `moving` or
# `staying` holds b and c where the range of keys has them.


@triton.jit
def _tangent_step(state, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    o_dot, r = state
    q, a, lse = staying
    k, v = _load(moving[0], b, n, row), _load(moving[1], b, n, row)
    p = _probabilities(_scores(q, k, None), lse[:, None], visible, scale)
    s_dot = _scores(a, k, None)
    if len(moving) == 4:
        s_dot = _scores(q, _load(moving[2], b, n, row), s_dot)
    p_dot = p * (s_dot * scale)
    o_dot = _mix(o_dot, p_dot, v)
    if len(moving) == 4:
        o_dot = _mix(o_dot, p, _load(moving[3], b, n, row))
    return o_dot, r + tl.sum(p_dot, 1)


@triton.jit(do_not_specialize=["T", "P", "window"])
def _tangent_kernel(
    q0, q1, a0, a1, o0, o1, do0, do1, od0, od1,
    k0, k1, v0, v1, b0, b1, c0, c1, pk0, pk1, pv0, pv1, pb0, pb1, pc0, pc1, lse, r, phi, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    b, n, first_query = _position(QUERIES)
    query = first_query + tl.arange(0, QUERIES)
    at = (b * tl.num_programs(1) + n) * _row_length(T) + query
    outputs = _parts(od0, od1)
    q, a = _load(_parts(q0, q1), b, n, first_query), _load(_parts(a0, a1), b, n, first_query)
    own, past = _with_tangents(k0, k1, v0, v1, b0, b1, c0, c1), _with_tangents(pk0, pk1, pv0, pv1, pb0, pb1, pc0, pc1)
    state = (_zeros(QUERIES, outputs), tl.zeros([QUERIES], tl.float32))
    staying = (q, a, tl.load(lse + at, query < T, 0.0))
    o_dot, total = _over_keys(
        _tangent_step, state, staying, own, past, b, n, first_query, T, P, window, scale,
        QUERIES, KEYS, GROUP, PAST, CLIPPED,
    )  # fmt: skip
    o_dot = _minus(o_dot, total, _load(_parts(o0, o1), b, n, first_query))
    tl.store(r + at, total, query < T)
    tl.store(phi + at, _row_products(o_dot, _load(_parts(do0, do1), b, n, first_query)), query < T)
    _store(outputs, b, n, first_query, o_dot)


@triton.jit
def _query_second_step(q_hat, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    q, a, do, lse, delta, r, phi = staying
    k, v = _load(moving[0], b, n, row), _load(moving[1], b, n, row)
    p = _probabilities(_scores(q, k, None), lse[:, None], visible, scale)
    s_dot = _scores(a, k, None)
    if len(moving) == 4:
        b_tile = _load(moving[2], b, n, row)
        s_dot = _scores(q, b_tile, s_dot)
    dp = _scores(do, v, None) - delta[:, None]
    s_hat = dp * (s_dot * scale - r[:, None]) - phi[:, None]
    if len(moving) == 4:
        s_hat = _scores(do, _load(moving[3], b, n, row), s_hat)
        q_hat = _mix(q_hat, p * dp, b_tile)
    return _mix(q_hat, p * s_hat, k)


@triton.jit(do_not_specialize=["T", "P", "window"])
def _query_second_kernel(
    q0, q1, a0, a1, do0, do1, qh0, qh1,
    k0, k1, v0, v1, b0, b1, c0, c1, pk0, pk1, pv0, pv1, pb0, pb1, pc0, pc1,
    lse, delta, r, phi, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, PAST: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    b, n, first_query = _position(QUERIES)
    query = first_query + tl.arange(0, QUERIES)
    at = (b * tl.num_programs(1) + n) * _row_length(T) + query
    outputs = _parts(qh0, qh1)
    q, a = _load(_parts(q0, q1), b, n, first_query), _load(_parts(a0, a1), b, n, first_query)
    do = _load(_parts(do0, do1), b, n, first_query)
    own, past = _with_tangents(k0, k1, v0, v1, b0, b1, c0, c1), _with_tangents(pk0, pk1, pv0, pv1, pb0, pb1, pc0, pc1)
    inside = query < T
    of_first = (tl.load(lse + at, inside, 0.0), tl.load(delta + at, inside, 0.0))
    staying = (q, a, do, of_first[0], of_first[1], tl.load(r + at, inside, 0.0), tl.load(phi + at, inside, 0.0))
    q_hat = _over_keys(
        _query_second_step, _zeros(QUERIES, outputs), staying, own, past, b, n, first_query, T, P, window, scale,
        QUERIES, KEYS, GROUP, PAST, CLIPPED,
    )  # fmt: skip
    _store(outputs, b, n, first_query, _scale(q_hat, scale))


@triton.jit
def _key_second_step(state, staying, moving, b, n, row, visible, scale, BLOCK: tl.constexpr):
    k_hat, v_hat = state
    k, v = staying[0], staying[1]
    queries, query_tangents, d_outputs, lse, delta, r, phi = moving
    q, a, do = _load(queries, b, n, row), _load(query_tangents, b, n, row), _load(d_outputs, b, n, row)
    p = _probabilities(_scores(k, q, None), _load_row(lse, b, n, row), visible, scale)
    s_dot = _scores(k, a, None)
    if len(staying) == 4:
        s_dot = _scores(staying[2], q, s_dot)
    s_dot = s_dot * scale - _load_row(r, b, n, row)
    v_hat = _mix(v_hat, p * s_dot, do)
    dp = _scores(v, do, None) - _load_row(delta, b, n, row)
    k_hat = _mix(k_hat, p * dp, a)
    s_hat = dp * s_dot - _load_row(phi, b, n, row)
    if len(staying) == 4:
        s_hat = _scores(staying[3], do, s_hat)
    return _mix(k_hat, p * s_hat, q), v_hat


@triton.jit(do_not_specialize=["T", "P", "window"])
def _key_second_kernel(
    q0, q1, a0, a1, do0, do1, k0, k1, v0, v1, b0, b1, c0, c1, kh0, kh1, vh0, vh1,
    lse, delta, r, phi, T, P, window, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, OWN: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """Of own keys, or with OWN False of the past, where k0 … vh1 and the rows of the grid are the past's."""
    b, g, first = tl.program_id(2), tl.program_id(1), tl.program_id(0) * KEYS
    shift = 0 if OWN else P
    key_outputs, value_outputs = _parts(kh0, kh1), _parts(vh0, vh1)
    k, v = _load(_parts(k0, k1), b, g, first), _load(_parts(v0, v1), b, g, first)
    if b0 is None:
        staying = (k, v)
    else:
        staying = (k, v, _load(_parts(b0, b1), b, g, first), _load(_parts(c0, c1), b, g, first))  # type: ignore[assignment]
    moving = (_parts(q0, q1), _parts(a0, a1), _parts(do0, do1), lse, delta, r, phi)
    state = (_zeros(KEYS, key_outputs), _zeros(KEYS, value_outputs))
    k_hat, v_hat = _over_queries(
        _key_second_step, state, staying, moving, b, g, first - shift, T, P, window, scale,
        QUERIES, KEYS, GROUP, OWN, CLIPPED,
    )  # fmt: skip
    _store(key_outputs, b, g, first, _scale(k_hat, scale))
    _store(value_outputs, b, g, first, v_hat)


# Launches.


def _ready(x: Tensor) -> Tensor:
    """x, or a copy, as a descriptor can address it: rows are contiguous and start at multiples of 16 bytes."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(step > 0 and step * x.itemsize % 16 == 0 for step in steps)
    return x if aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else _new(x).copy_(x)


def _new(like: Tensor) -> Tensor:
    """Memory for a tensor of the size of `like` [B, N, T, H], and in its order, that is `_ready`."""
    B, N, T, H = like.shape
    unit = 16 // like.itemsize
    row = -(-H // unit) * unit
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, N, row).transpose(1, 2)[..., :H]
    return like.new_empty(B, N, T, row)[..., :H]


def _descriptors(x: Tensor, rows: int) -> list[TensorDescriptor | None]:
    """Of the two parts of x [B, N, T, H], in tiles of so many rows."""
    H = x.shape[-1]
    first = max(16, 1 << (H.bit_length() - 1))
    widths = [first] if first >= H else [first, max(16, 1 << (H - first - 1).bit_length())]
    strides = [x.stride(i) if x.shape[i] > 1 else 16 for i in range(3)] + [1]
    tiles = [TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, width]) for width in widths]
    return [*tiles, *[None] * (2 - len(tiles))]


def _row_of(query: Tensor) -> Tensor:
    """Memory for one float32 a query [B, N, T], whose rows start at multiples of 16 bytes."""
    B, N, T, _ = query.shape
    return query.new_empty(B, N, -(-T // 4) * 4, dtype=torch.float32)


class _Problem(NamedTuple):
    """Sizes that all kernels of one attention share."""

    T: int
    P: int
    window: int
    scale: float

    def launch(
        self,
        kernel: Any,
        by_query: list[Tensor | None],
        by_key: list[Tensor | None],
        statistics: list[Any],
        past_alone: bool | None = None,
        **constants: int,
    ) -> None:
        """Runs a kernel whose tiles are, in this order, of queries and of keys.

        Args:
            statistics: one number a query, from `_row_of`; and whatever else the kernel takes there.
            past_alone: None for a sweep over keys; else whether the keys are the past's or the queries' own.
        """
        query: Any = by_query[0]
        key: Any = by_key[0]
        group = query.shape[1] // key.shape[1]
        name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
        blocks = blocks_of(name, query.shape[-1], query.itemsize)
        T, P, window, _ = self
        numbers: list[Any] = statistics
        if past_alone is None:
            rows, heads, step, flags = T, query.shape[1], blocks.queries, (P > 0, window < T)
        else:
            rows, heads, step = (P if past_alone else T), key.shape[1], blocks.keys
            flags = (not past_alone, window < T + P * past_alone)
            shape = [*query.shape[:2], T]
            numbers = [TensorDescriptor(x, shape, list(x.stride()), [1, 1, blocks.queries]) for x in statistics]
        arguments: list[Any] = []
        for tensors, rows_of_tile in ((by_query, blocks.queries), (by_key, blocks.keys)):
            for x in tensors:  # an empty past is never looked at, but a descriptor of nothing cannot be
                x = key if x is not None and x.numel() == 0 else x
                arguments += [None, None] if x is None else _descriptors(_ready(x), rows_of_tile)
        grid = (triton.cdiv(rows, step), heads, query.shape[0])
        with torch.cuda.device_of(query):
            kernel[grid](
                *arguments, *numbers, *self, blocks.queries, blocks.keys, group, *flags,
                num_warps=blocks.warps, num_stages=blocks.stages, **constants,
            )  # fmt: skip


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    window: int,
    scale: float,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as an operation that PyTorch knows by name (see `KEPT_OPERATIONS`)."""
    o, lse = _new(q), _row_of(q)
    problem = _Problem(q.shape[2], past_k.shape[2], window, scale)
    bounded = query_gain is not None
    if query_gain is not None and key_gain is not None and overlaps(q, k, query_gain):
        from longread.ops.attention.overlapped import overlapped_forward

        q, k, v, past_k, past_v = (_ready(x) for x in (q, k, v, past_k, past_v))
        gains = query_gain, key_gain
        overlapped_forward(q, k, v, (past_k, past_v), window, scale, gains, LARGEST_BOUND.value, o, lse)
        bounded = False
    for bound in (True, False) if bounded else (False,):
        problem.launch(
            _forward_kernel,
            [q, o],
            [k, v, past_k, past_v],
            [lse, query_gain, key_gain],
            H=q.shape[-1],
            BOUNDED=bound,
        )
    return o, lse


# without the wrappers of `library.custom_op`, which import PyTorch's compiler when it is first called: seconds
_LIBRARY = library.Library("longread", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, int window, float scale,"
    " Tensor? query_gain, Tensor? key_gain) -> (Tensor, Tensor)"
)
_LIBRARY.impl("attention", _launch_forward, "CompositeExplicitAutograd")
_attend = torch.ops.longread.attention.default


class _Attention(torch.autograd.Function):
    """(query, key, value, past key, past value) -> (output; these for `_AttentionGradient`)

    An absent past is empty.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        problem: _Problem,
        gains: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, ...]:
        o, lse = _attend(q, k, v, past_k, past_v, problem.window, problem.scale, *gains)
        read = handed_on(ctx, q, k, v, past_k, past_v)
        ctx.save_for_backward(*read, o, lse)
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        return o, *read

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *left: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, past_k, past_v, o, lse = ctx.saved_tensors
        if do is None:
            return *left, None, None
        needs = needed_inputs(ctx)
        with_own, with_past = any(needs[1:3]), any(needs[3:5]) and ctx.problem.P > 0
        recorded = torch.is_grad_enabled()
        gradients = _AttentionGradient.apply(
            q,
            k,
            v,
            past_k,
            past_v,
            do,
            o.detach(),
            lse,
            ctx.problem,
            with_own,
            with_past,
            (None,) * 5 if recorded else left,
        )
        if recorded:
            gradients = (
                more if d is None else d if more is None else d + more for d, more in zip(gradients, left, strict=True)
            )
        return *gradients, None, None


class _AttentionGradient(torch.autograd.Function):
    """(q, k, v, past k, past v, do) -> their gradients, with what is left for them

    o and lse are by-products of these inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        do: Tensor,
        o: Tensor,
        lse: Tensor,
        problem: _Problem,
        with_own: bool,
        with_past: bool,
        left: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        dq, delta = _new(q), _row_of(q)
        problem.launch(_query_gradient_kernel, [q, o, do, dq, left[0]], [k, v, past_k, past_v], [lse, delta])
        gradients: list[Tensor | None] = [dq]
        for wanted, keys, values, more, past_alone in (
            (with_own, k, v, left[1:3], False),
            (with_past, past_k, past_v, left[3:5], True),
        ):
            if wanted:
                dk, dv = _new(keys), _new(values)
                problem.launch(_key_gradient_kernel, [q, do], [keys, values, dk, dv, *more], [lse, delta], past_alone)
                gradients += [dk, dv]
            else:
                gradients += [None, None]
        ctx.save_for_backward(q, k, v, past_k, past_v, do, o, lse, delta)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return tuple(gradients)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, past_b: Tensor | None, past_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, past_k, past_v, do, o, lse, delta = ctx.saved_tensors
        problem, needs = ctx.problem, needed_inputs(ctx)
        nothing = (None,) * 6
        if all(x is None for x in (a, b, c, past_b, past_c)):
            return *nothing, *nothing
        a = torch.zeros_like(q) if a is None else a
        b, c = _both_or_none(b, c, k)
        past_b, past_c = _both_or_none(past_b, past_c, past_k)
        tensors = [k, v, b, c, past_k, past_v, past_b, past_c]

        o_dot, r, phi = _new(q), _row_of(q), _row_of(q)
        problem.launch(_tangent_kernel, [q, a, o, do, o_dot], tensors, [lse, r, phi])
        statistics = [lse, delta, r, phi]
        q_hat = _new(q) if needs[0] else None
        if q_hat is not None:
            problem.launch(_query_second_kernel, [q, a, do, q_hat], tensors, statistics)
        adjoints: list[Tensor | None] = [q_hat]
        for wanted, tensors, past_alone in (
            (any(needs[1:3]), [k, v, b, c], False),
            (any(needs[3:5]) and problem.P > 0, [past_k, past_v, past_b, past_c], True),
        ):
            if wanted:
                k_hat, v_hat = _new(k if not past_alone else past_k), _new(v if not past_alone else past_v)
                problem.launch(_key_second_kernel, [q, a, do], [*tensors, k_hat, v_hat], statistics, past_alone)
                adjoints += [k_hat, v_hat]
            else:
                adjoints += [None, None]
        return *adjoints, o_dot, *nothing


def _both_or_none(b: Tensor | None, c: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if b is None and c is None:
        return None, None
    return (torch.zeros_like(like) if b is None else b), (torch.zeros_like(like) if c is None else c)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None,
    gains: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at order 2, for float32, float16 and bfloat16."""
    past_key, past_value = (key.new_empty(*key.shape[:2], 0, key.shape[3]),) * 2 if past is None else past
    T, P = query.shape[2], past_key.shape[2]
    everything = T + P
    window = everything if window is None else min(window, everything)
    problem = _Problem(T, P, window, query.shape[-1] ** -0.5)
    if query.dtype == torch.float16:
        gains = None
    bounds = (None, None) if gains is None else tuple(gain.detach().contiguous() for gain in gains)
    return _Attention.apply(query, key, value, past_key, past_value, problem, bounds)[0]


settle_names(globals())
