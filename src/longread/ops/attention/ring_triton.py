"""Attention over a ring for NVIDIA GPUs: bound by memory, so the ring is split among enough programs to keep it busy.

Each program takes the softmax over its share of the slots, and the one of a head that ends last puts the shares
together, in their order: the result is the same in every run. The program whose share holds the new token's slot
writes it down before it looks. In a share every row of a block runs a softmax of its own, over each BLOCK-th slot, and
the rows are put together at the end: nothing in the loop waits for another row.

A program that serves one head is one warp. It loads keys and values by pieces of 16 columns, so that no thread stands
for columns that a head lacks (48 of 128 where it has 80), and straight into registers, two blocks at a time. A slot
then takes less than half as many instructions as with whole rows by way of shared memory, and they count beside the
bytes. Heads that share a ring are served by one program, as many as its registers hold, so that the ring is read once;
it loads whole rows, as does one whose head is too wide for pieces.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton does not unpack into tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from longread.ops.precompile import settle_names
from longread.ops.rms_norm import Gain

BLOCK = 16
"""Slots that a program looks at together."""
SHARE = 256
"""Slots of a program that serves one head; more where the ring would have more than `MOST_SHARES`."""
SMALLEST_SHARE = 64
"""Where programs are few, since they serve several heads or there are few heads, each gets less, down to this."""
MOST_SHARES = 256
ENOUGH_PROGRAMS = 512
"""Of a sequence, four for each processor of an H200: while heads by pieces have fewer, their shares are halved. Other
sequences do not count: how a ring is split shows in the last bits of what is read."""
PIECE, MOST_PIECES = 16, 5
"""Columns that a program of one head loads at a time, 16 bytes a thread; and how many of them its registers hold."""
UNROLL, REGISTERS = 2, 200
"""Of such a program: blocks that are loaded together, and together rescale the sums; of each thread at most."""
WARPS, STAGES = 2, 3
"""Of other programs: at least so many warps, and blocks on their way through shared memory."""
COLUMNS, MOST_WARPS = 128, 8
"""Where a program serves several heads: columns of all of them for each of its warps, whose threads keep BLOCK / 32
numbers of a column in registers."""
TOGETHER = 32
"""Shares of a head that are put together at a time."""
LOG2E = tl.constexpr(1.4426950408889634)


def triton_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: tuple[Tensor, Tensor],
    position: Tensor,
    *,
    window: int | None,
    norms: tuple[Gain, Gain] | None = None,
    rotary: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """The contract of `longread.ops.attention.ring.ring_attention`."""
    B, G, R, H = ring[0].shape
    N = query.shape[1]
    width = triton.next_power_of_2(H)
    heads = heads_of(N // G, width)
    pieces = by_pieces(heads, H)
    share = share_of(R, N, heads, pieces=pieces)
    shares = triton.cdiv(R, share)
    query, key, value = (x.reshape(B, x.shape[1], H) for x in (query, key, value))
    mixed = torch.empty(B, N, shares, H, device=query.device, dtype=torch.float32)
    statistics = torch.empty(B, N, shares, 2, device=query.device, dtype=torch.float32)
    out = torch.empty(B, N, H, device=query.device, dtype=query.dtype)
    if arrivals is None:
        arrivals = torch.zeros(B * N, device=query.device, dtype=torch.int32)
    angles = mixed if rotary is None else torch.view_as_real(rotary.to(torch.complex64)).reshape(B, H)
    query_norm, key_norm = norms or (Gain(query, 1.0), Gain(key, 1.0))  # not read
    if out.numel():
        _ring_kernel[(shares, N // heads, B)](
            query, key, value, *ring, position, mixed, statistics, arrivals, out,
            query_norm.weight, key_norm.weight, angles,
            R, share, R if window is None else min(window, R), H**-0.5, query_norm.eps, key_norm.eps,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            H=H, WIDTH=width, BLOCK=BLOCK, PIECE=PIECE if pieces else width, UNROLL=UNROLL if pieces else 1,
            STAGES=1 if pieces else STAGES, HEADS=heads, PARTS=N // G // heads, NORM=norms is not None,
            TURN=rotary is not None, TOGETHER=min(TOGETHER, triton.next_power_of_2(shares)),
            num_warps=1 if pieces else max(WARPS, triton.next_power_of_2(triton.cdiv(heads * width, COLUMNS))),
            maxnreg=REGISTERS if pieces else None,
        )  # fmt: skip
    return out.view(B, N, 1, H)


def heads_of(group: int, width: int) -> int:
    """How many heads of a group of so many a program serves, of a width that is a power of 2."""
    most = max(1, MOST_WARPS * COLUMNS // width)
    return max(heads for heads in range(1, min(group, most) + 1) if group % heads == 0)


def by_pieces(heads: int, H: int) -> bool:
    """Whether a program that serves so many heads of dimension H loads keys and values by pieces."""
    return heads == 1 and H % PIECE == 0 and H <= MOST_PIECES * PIECE


def share_of(R: int, N: int, heads: int, *, pieces: bool) -> int:
    """How many of R slots a program takes that serves so many of N heads."""
    share = SHARE if heads == 1 else max(SMALLEST_SHARE, SHARE // heads // BLOCK * BLOCK)
    while pieces and share > SMALLEST_SHARE and N * triton.cdiv(R, share) < ENOUGH_PROGRAMS:
        share //= 2
    return max(share, BLOCK * triton.cdiv(R, BLOCK * MOST_SHARES))


@triton.jit(do_not_specialize=["R", "share", "window"])
def _ring_kernel(
    query, key, value, ring_key, ring_value, positions, mixed, statistics, arrivals, result,
    query_gain, key_gain, angles, R, share, window, scale, query_eps, key_eps,
    query_b, query_n, key_b, key_n, value_b, value_n,
    H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Of HEADS heads, whose ring is that of PARTS programs: all of them write the same new token, none waits."""
    b, n, index = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    PIECES: tl.constexpr = (H + PIECE - 1) // PIECE
    g = n // PARTS
    head = (b * tl.num_programs(1) + n).to(tl.int64)
    begin = index * share
    first_element = head // PARTS * R * H + begin.to(tl.int64) * H
    ring_key += first_element
    ring_value += first_element
    position = tl.load(positions + b)
    column = tl.arange(0, PIECE)
    q = ()
    for i in tl.static_range(HEADS):
        vector = query + b * query_b + (n * HEADS + i) * query_n
        norm = scale * LOG2E
        if NORM:
            norm *= _norm(vector, query_eps, H, WIDTH)
        for j in tl.static_range(PIECES):
            x = _prepared(vector, query_gain, angles + b * H, norm, j * PIECE + column, H, NORM, TURN)
            q = q + (x,)
    here = (position % R).to(tl.int32)
    end = tl.minimum(begin + share, R)
    if position < R:  # slots that no token has reached
        end = tl.minimum(end, here + 1)
    if (here >= begin) & (here < end):
        wide = tl.arange(0, WIDTH)
        inside = wide < H
        new = (here - begin) * H + wide
        vector = key + b * key_b + g * key_n
        norm = 1.0
        if NORM:
            norm = _norm(vector, key_eps, H, WIDTH)
        prepared = _prepared(vector, key_gain, angles + b * H, norm, wide, H, NORM, TURN)
        tl.store(ring_key + new, prepared, inside)
        tl.store(ring_value + new, tl.load(value + b * value_b + g * value_n + wide, inside, 0.0), inside)
        tl.debug_barrier()
    highest, total, out = (), (), ()
    for _ in tl.static_range(HEADS):
        highest = highest + (tl.full([BLOCK], -1e30, tl.float32),)
        total = total + (tl.zeros([BLOCK], tl.float32),)
        for _ in tl.static_range(PIECES):
            out = out + (tl.zeros([BLOCK, PIECE], tl.float32),)
    for first in tl.range(begin, end, BLOCK * UNROLL, num_stages=STAGES):
        k, v, visible = (), (), ()
        for u in tl.static_range(UNROLL):
            slot = first + u * BLOCK + tl.arange(0, BLOCK)
            back = here - slot
            seen = (slot < end) & (tl.where(back < 0, back + R, back) < window)
            visible = visible + (seen,)
            at = (slot - begin)[:, None] * H + column[None, :]
            read = seen[:, None] & (column < H)[None, :] if H % PIECE else seen[:, None]
            for j in tl.static_range(PIECES):
                k = k + (tl.load(ring_key + j * PIECE + at, read, 0.0, eviction_policy="evict_first"),)
            for j in tl.static_range(PIECES):
                v = v + (tl.load(ring_value + j * PIECE + at, read, 0.0, eviction_policy="evict_first"),)
        highest, total, out = _look(q, k, v, visible, highest, total, out, HEADS, PIECES, UNROLL)
    for i in tl.static_range(HEADS):
        most = tl.max(highest[i], 0)
        weight = tl.exp2(highest[i] - most)
        at = (head * HEADS + i) * tl.num_programs(0) + index
        tl.store(statistics + at * 2, most)
        tl.store(statistics + at * 2 + 1, tl.sum(total[i] * weight, 0))
        for j in tl.static_range(PIECES):
            inside = j * PIECE + column < H
            tl.store(mixed + at * H + j * PIECE + column, tl.sum(out[i * PIECES + j] * weight[:, None], 0), inside)
    tl.debug_barrier()  # the stores of all threads come before the one that says so
    if tl.atomic_add(arrivals + head, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + head, 0)
        for i in tl.static_range(HEADS):
            _join(mixed, statistics, result, head * HEADS + i, tl.num_programs(0), H, PIECE, PIECES, TOGETHER)


@triton.jit
def _norm(vector, eps, H: tl.constexpr, WIDTH: tl.constexpr):
    """What a vector is multiplied with to have a root mean square of 1."""
    column = tl.arange(0, WIDTH)
    x = tl.load(vector + column, column < H, 0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / H + eps)


@triton.jit
def _prepared(vector, gain, angles, norm, column, H: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr):
    """Columns of a new query or key in float32, scaled, normed and turned."""
    inside = column < H
    x = tl.load(vector + column, inside, 0.0).to(tl.float32) * norm
    if NORM:
        x *= tl.load(gain + column, inside, 0.0).to(tl.float32)
    if TURN:
        WIDTH: tl.constexpr = column.shape[0]
        even, odd = tl.split(tl.reshape(x, [WIDTH // 2, 2]))
        at, part = tl.reshape(column, [WIDTH // 2, 2]), tl.reshape(inside, [WIDTH // 2, 2])
        cos, sin = tl.split(tl.load(angles + at, part, 0.0))
        x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [WIDTH])
    return x


@triton.jit
def _look(q, k, v, visible, highest, total, out, HEADS: tl.constexpr, PIECES: tl.constexpr, UNROLL: tl.constexpr):
    """Each head's softmax goes on over UNROLL blocks of slots."""
    new_highest, new_total, new_out = (), (), ()
    for i in tl.static_range(HEADS):
        scores, higher = (), highest[i]
        for u in tl.static_range(UNROLL):
            product = q[i * PIECES][None, :] * k[u * PIECES].to(tl.float32)
            for j in tl.static_range(1, PIECES):
                product += q[i * PIECES + j][None, :] * k[u * PIECES + j].to(tl.float32)
            s = tl.where(visible[u], tl.sum(product, 1), float("-inf"))
            higher = tl.maximum(higher, s)
            scores = scores + (s,)
        shrink = tl.exp2(highest[i] - higher)
        all_p, weights = total[i] * shrink, ()
        for u in tl.static_range(UNROLL):
            p = tl.exp2(scores[u] - higher)
            all_p += p
            weights = weights + (p,)
        new_highest = new_highest + (higher,)
        new_total = new_total + (all_p,)
        for j in tl.static_range(PIECES):
            x = out[i * PIECES + j] * shrink[:, None]
            for u in tl.static_range(UNROLL):
                x += weights[u][:, None] * v[u * PIECES + j].to(tl.float32)
            new_out = new_out + (x,)
    return new_highest, new_total, new_out


@triton.jit
def _join(
    mixed, statistics, result, head, shares,
    H: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Puts the shares of a head together. They were written by other processors: no cache of this one may answer."""
    column = tl.arange(0, PIECE)
    highest, total, out = -1e30, 0.0, ()
    for _ in tl.static_range(PIECES):
        out = out + (tl.zeros([PIECE], tl.float32),)
    for first in range(0, shares, TOGETHER):
        share = first + tl.arange(0, TOGETHER)
        there, row = share < shares, head * shares + share
        peaks = tl.load(statistics + row * 2, there, -1e30, cache_modifier=".cg")
        totals = tl.load(statistics + row * 2 + 1, there, 0.0, cache_modifier=".cg")
        x = ()
        for j in tl.static_range(PIECES):
            part = j * PIECE + column
            at = row[:, None] * H + part[None, :]
            x = x + (tl.load(mixed + at, there[:, None] & (part < H)[None, :], 0.0, cache_modifier=".cg"),)
        higher = tl.maximum(highest, tl.max(peaks, 0))
        shrink, weight = tl.exp2(highest - higher), tl.exp2(peaks - higher)
        highest, total = higher, total * shrink + tl.sum(weight * totals, 0)
        new_out = ()
        for j in tl.static_range(PIECES):
            new_out = new_out + (out[j] * shrink + tl.sum(x[j] * weight[:, None], 0),)
        out = new_out
    for j in tl.static_range(PIECES):
        part = j * PIECE + column
        tl.store(result + head * H + part, out[j] / total, part < H)


settle_names(globals())
