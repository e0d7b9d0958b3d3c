# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="misc"
"""The forward pass of triton.py for Hopper GPUs, where norms bound the scores: its softmax and its products overlap.

A program has 256 queries of a head, 128 for each of two warp groups, and a warp that loads keys and values for both. A
group has its queries as two halves a and b. While it computes the probabilities P of one half, the tensor cores make
output O and scores S of the other, block of keys after block of keys:

    tensor cores    S_a(0) | S_b(0) | O_a(0) S_a(1) | O_b(0) S_b(1) | O_a(1) S_a(2) | …
    elementwise              P_a(0)   P_b(0)          P_a(1)          P_b(1)

Nothing is under way at a line: ptxas runs products one after the other where it cannot follow what is under way.
Triton schedules products on its own, so this is Gluon, its experimental language one level below.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

FIRST = gl.constexpr(64)
"""A head is that many columns and `SECOND` more, 16 or 32: both are tiles, which are as wide as a power of two."""
KEYS, STAGES, REGISTERS = 64, 4, 240
"""In a block; blocks that are loaded or looked at; of a thread that computes."""
LOG2E = gl.constexpr(1.4426950408889634)


def overlapped_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    window: int,
    scale: float,
    gains: tuple[Tensor, Tensor],
    largest_bound: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes output and log-sum-exp, unless the bound of the scores is larger than `largest_bound`: then nothing.

    Args:
        query: [B, N, T, H]; key, value: [B, G, T, H]; past: each [B, G, P, H]; all bfloat16, for descriptors.
        out: [B, N, T, H], its rows contiguous.
        lse: float32 [B, N, T rounded up to 4].
    """
    B, N, T, H = query.shape
    P = past[0].shape[2]
    second = 16 if FIRST.value + 16 >= H else 32
    keys = [key, value, *(past if P else (key, value))]  # an absent past is never looked at
    with torch.cuda.device_of(query):
        _overlapped_forward[((T + 255) // 256, N, B)](
            *_descriptors(query, 64, second), *(part for x in keys for part in _descriptors(x, KEYS, second)),
            out, lse, *gains, T, P, window, scale, largest_bound, *out.stride()[:3], lse.shape[-1], N // key.shape[1],
            H, second, KEYS, STAGES, REGISTERS, num_warps=4,
        )  # fmt: skip


def _descriptors(x: Tensor, rows: int, second: int) -> list[TensorDescriptor]:
    strides = [x.stride(i) if x.shape[i] > 1 else 16 for i in range(3)] + [1]
    blocks = [[1, 1, rows, width] for width in (FIRST.value, second)]
    layouts = [gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16) for block in blocks]
    return [TensorDescriptor(x, list(x.shape), strides, *pair) for pair in zip(blocks, layouts, strict=True)]


@gluon.jit
def _largest(pointer, H: gl.constexpr):
    column = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.max(gl.abs(gl.load(pointer + column, column < H, 0.0).to(gl.float32)), 0)


@gluon.jit
def _tile(tiles, index, rows: gl.constexpr):
    """Both parts of one of the tiles in shared memory."""
    first, second = tiles[0].index(index), tiles[1].index(index)
    return first.reshape([rows, first.shape[3]]), second.reshape([rows, second.shape[3]])


@gluon.jit
def _scores(q, keys, zeros):
    """Begins to make q kᵀ."""
    s = warpgroup_mma(q[0], keys[0].permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q[1], keys[1].permute((1, 0)), s, is_async=True)


@gluon.jit
def _mix(p, values, out):
    """Begins to add p v to both parts of the output; also p, as it must stay until then."""
    A: gl.constexpr = gl.DotOperandLayout(0, out[0].type.layout, 2)
    B: gl.constexpr = gl.DotOperandLayout(0, out[1].type.layout, 2)
    p0, p1 = gl.convert_layout(p, A), gl.convert_layout(p, B)
    out0 = warpgroup_mma(p0, values[0], out[0], is_async=True)
    return (out0, warpgroup_mma(p1, values[1], out[1], is_async=True)), (p0, p1)


@gluon.jit
def _probabilities(s, total, position, first_key, bounds, DTYPE: gl.constexpr, MASKED: gl.constexpr):
    """Also the sums of their rows, which stay with the threads that made them: [rows, 8]."""
    window, past, scale, bound = bounds
    if MASKED:
        key = first_key + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        visible = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        s = gl.where(visible & (key[None, :] >= -past), s, float("-inf"))
    p = gl.exp2(s * scale - bound)
    return p.to(DTYPE), total + gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def _meet(
    j, state, q, keys, values, bars, start, position, bounds, zeros,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Block j of keys: the scores s_a of it are there, and the probabilities p_b of the block before.

    Waits stand between the issue of products and a softmax, and between that and the wait for them: ptxas moves nothing
    across these, and would else compute the softmax after the wait.
    """
    s_a, p_b, out_a, out_b, total_a, total_b = state
    keys_there, values_there, keys_free, values_free = bars
    slot, before, following = j % STAGES, gl.maximum(j - 1, 0) % STAGES, (j + 1) % STAGES
    first_key = start + j * KEYS
    DTYPE: gl.constexpr = p_b.dtype

    out_b, p_b = _mix(p_b, _tile(values, before, KEYS), out_b)
    s_b = _scores((q[2], q[3]), _tile(keys, slot, KEYS), zeros)
    mbarrier.wait(values_there.index(slot), (j // STAGES) & 1)
    p_a, total_a = _probabilities(s_a, total_a, position, first_key, bounds, DTYPE, MASKED)
    if not LAST:
        mbarrier.wait(keys_there.index(following), ((j + 1) // STAGES) & 1)
    s_b, out_b0, out_b1, _0, _1, p_a, total_a = warpgroup_mma_wait(
        0, (s_b, out_b[0], out_b[1], p_b[0], p_b[1], p_a, total_a)
    )

    out_a, p_a = _mix(p_a, _tile(values, slot, KEYS), out_a)
    if not LAST:
        s_a = _scores((q[0], q[1]), _tile(keys, following, KEYS), zeros)
        gl.thread_barrier()  # the keys of j and the values of j − 1 have been read by all warps of the group
        mbarrier.arrive(keys_free.index(slot), count=1)
        if j > 0:
            mbarrier.arrive(values_free.index(before), count=1)
    p_b, total_b = _probabilities(s_b, total_b, position + 64, first_key, bounds, DTYPE, MASKED)
    if LAST:
        out_a0, out_a1, _0, _1 = warpgroup_mma_wait(0, (out_a[0], out_a[1], p_a[0], p_a[1]))
    else:
        mbarrier.wait(keys_there.index(following), ((j + 1) // STAGES) & 1)
        s_a, out_a0, out_a1, _0, _1, p_b, total_b = warpgroup_mma_wait(
            0, (s_a, out_a[0], out_a[1], p_a[0], p_a[1], p_b, total_b)
        )
    return s_a, p_b, (out_a0, out_a1), (out_b0, out_b1), total_a, total_b


@gluon.jit
def _store_part(x, total, first_query, first_column: gl.constexpr, out_ptr, row_stride, T, H: gl.constexpr):
    layout: gl.constexpr = x.type.layout
    row = first_query + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    x *= (1 / gl.convert_layout(total, gl.SliceLayout(1, layout)))[:, None]
    at = out_ptr + row[:, None].to(gl.int64) * row_stride + column[None, :]
    gl.store(at, x.to(out_ptr.dtype.element_ty), (row < T)[:, None] & (column < H)[None, :])


@gluon.jit
def _store(out, total, first_query, out_ptr, lse_ptr, row_stride, T, bound, H: gl.constexpr):
    total = gl.sum(total, 1)
    _store_part(out[0], total, first_query, 0, out_ptr, row_stride, T, H)
    _store_part(out[1], total, first_query, 64, out_ptr, row_stride, T, H)
    row = first_query + gl.arange(0, 64, total.type.layout)
    gl.store(lse_ptr + row, bound + gl.log2(total), row < T)


@gluon.jit
def _compute(work, WHICH: gl.constexpr, H: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """A warp group: all blocks of keys with the queries `WHICH` · 128 … of the program."""
    shared, out_ptr, lse_ptr, first_query, start, count, T, row_stride, bounds = work
    queries, keys, values, queries_there, bars = shared
    SECOND: gl.constexpr = queries[1].shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SECOND, 16])
    window, past, _, bound = bounds
    first_query += WHICH * 128
    # blocks before `clipped` and from `whole` on have keys that some query does not see
    clipped = gl.minimum(gl.maximum(first_query + 128 - window - start + KEYS - 1, 0) // KEYS, count - 1)
    if past % KEYS != 0:
        clipped = gl.maximum(clipped, gl.minimum(1, count - 1))
    whole = gl.minimum(gl.maximum((first_query + 1 - start) // KEYS, clipped), count - 1)

    position = first_query + gl.arange(0, 64, gl.SliceLayout(1, S))
    zeros = gl.zeros([64, KEYS], gl.float32, S)
    nothing = (gl.zeros([64, 64], gl.float32, O0), gl.zeros([64, SECOND], gl.float32, O1))
    total = gl.sum(zeros.reshape([64, KEYS // 8, 8]), 1)
    mbarrier.wait(queries_there.index(0), 0)
    mbarrier.wait(bars[0].index(0), 0)
    q0, q1 = _tile(queries, 2 * WHICH, 64)
    q2, q3 = _tile(queries, 2 * WHICH + 1, 64)
    q = (q0, q1, q2, q3)
    s_a = warpgroup_mma_wait(0, (_scores((q0, q1), _tile(keys, 0, KEYS), zeros),))
    mbarrier.wait(bars[1].index(0), 0)  # nothing is added in the first block, but values that are none would be
    state = (s_a, zeros.to(queries[0].dtype), nothing, nothing, total, total)
    for j in range(clipped):
        state = _meet(j, state, q, keys, values, bars, start, position, bounds, zeros, KEYS, STAGES, True, False)
    for j in range(clipped, whole):
        state = _meet(j, state, q, keys, values, bars, start, position, bounds, zeros, KEYS, STAGES, False, False)
    for j in range(whole, count - 1):
        state = _meet(j, state, q, keys, values, bars, start, position, bounds, zeros, KEYS, STAGES, True, False)
    state = _meet(count - 1, state, q, keys, values, bars, start, position, bounds, zeros, KEYS, STAGES, True, True)
    out_b, p_b = _mix(state[1], _tile(values, (count - 1) % STAGES, KEYS), state[3])
    out_b0, out_b1, _0, _1 = warpgroup_mma_wait(0, (out_b[0], out_b[1], p_b[0], p_b[1]))
    _store(state[2], state[4], first_query, out_ptr, lse_ptr, row_stride, T, bound, H)
    _store((out_b0, out_b1), state[5], first_query + 64, out_ptr, lse_ptr, row_stride, T, bound, H)


@gluon.jit
def _load_tile(x, b, n, row, bar, to, index):
    tma.async_copy_global_to_shared(x[0], [b, n, row, 0], bar, to[0].index(index))
    tma.async_copy_global_to_shared(x[1], [b, n, row, 64], bar, to[1].index(index))


@gluon.jit
def _load_block(own, past, to, there, free, j, b, g, start, P, KEYS: gl.constexpr, STAGES: gl.constexpr):
    slot, first = j % STAGES, start + j * KEYS
    bar = there.index(slot)
    mbarrier.wait(free.index(slot), (j // STAGES + 1) & 1, pred=j >= STAGES)
    mbarrier.expect(bar, KEYS * (64 + to[1].shape[4]) * 2)
    if first < 0:
        _load_tile(past, b, g, first + P, bar, to, slot)
    else:
        _load_tile(own, b, g, first, bar, to, slot)


@gluon.jit
def _load(inputs, shared, b, n, g, first_query, start, count, P, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads."""
    q, k, v, past_k, past_v = inputs
    queries, keys, values, queries_there, bars = shared
    keys_there, values_there, keys_free, values_free = bars
    bar = queries_there.index(0)
    mbarrier.expect(bar, 256 * (64 + queries[1].shape[4]) * 2)
    for i in gl.static_range(4):
        _load_tile(q, b, n, first_query + 64 * i, bar, queries, i)
    for j in range(count):
        _load_block(k, past_k, keys, keys_there, keys_free, j, b, g, start, P, KEYS, STAGES)
        _load_block(v, past_v, values, values_there, values_free, j, b, g, start, P, KEYS, STAGES)


@gluon.jit
def _tiles(descriptors, count: gl.constexpr):
    rows: gl.constexpr = descriptors[0].block_shape[2]
    first, second = descriptors[0], descriptors[1]
    return (
        gl.allocate_shared_memory(first.dtype, [count, 1, 1, rows, first.block_shape[3]], first.layout),
        gl.allocate_shared_memory(second.dtype, [count, 1, 1, rows, second.block_shape[3]], second.layout),
    )


@gluon.jit
def _bars(number: gl.constexpr, count: gl.constexpr):
    """Each waits for so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit(do_not_specialize=["T", "P", "window", "lse_stride"])
def _overlapped_forward(
    q0, q1, k0, k1, v0, v1, pk0, pk1, pv0, pv1, out_ptr, lse_ptr, query_gain, key_gain, T, P, window, scale,
    largest_bound, batch_stride, head_stride, row_stride, lse_stride, GROUP: gl.constexpr, H: gl.constexpr,
    SECOND: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    bound = H * scale * LOG2E * _largest(query_gain, H) * _largest(key_gain, H)
    if bound > largest_bound:
        return
    b, n = gl.program_id(2), gl.program_id(1)
    first_query = (gl.num_programs(0) - 1 - gl.program_id(0)) * 256  # the longest first
    tiles = (_tiles((q0, q1), 4), _tiles((k0, k1), STAGES), _tiles((v0, v1), STAGES))
    bars = (_bars(STAGES, 1), _bars(STAGES, 1), _bars(STAGES, 2), _bars(STAGES, 2))
    shared = (tiles[0], tiles[1], tiles[2], _bars(1, 1), bars)
    gl.thread_barrier()
    reach = gl.minimum(P, gl.maximum(window - 1 - first_query, 0))
    start = -((reach + KEYS - 1) // KEYS) * KEYS
    if reach == 0:
        start = gl.maximum(first_query - window + 1, 0) // KEYS * KEYS
    count = (gl.minimum(T, first_query + 256) - start + KEYS - 1) // KEYS
    out_ptr += b.to(gl.int64) * batch_stride + n.to(gl.int64) * head_stride
    lse_ptr += (b * gl.num_programs(1) + n) * lse_stride
    bounds = (window, P, scale * LOG2E, bound)
    inputs = ((q0, q1), (k0, k1), (v0, v1), (pk0, pk1), (pv0, pv1))
    work = (shared, out_ptr, lse_ptr, first_query, start, count, T, row_stride, bounds)
    gl.warp_specialize(
        [
            (_compute, (work, 0, H, KEYS, STAGES)),
            (_compute, (work, 1, H, KEYS, STAGES)),
            (_load, (inputs, shared, b, n, n // GROUP, first_query, start, count, P, KEYS, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
