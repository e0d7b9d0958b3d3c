"""Attention over a ring for NVIDIA GPUs: bound by memory, so the ring is split among enough programs to keep it busy.

Each program takes the softmax over its share of the slots, and the one of a head that ends last puts the shares
together, in their order: the result is the same in every run. The program whose share holds the new token's slot
writes it down before it looks. In a share every row of a block runs a softmax of its own, over each BLOCK-th slot, and
the rows are put together at the end: nothing in the loop waits for another row.

Heads that share a ring are served by one program, as many as its registers hold, so that the ring is read once.
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
"""Programs that serve several heads are fewer, so each gets fewer slots, down to this."""
MOST_SHARES = 256
WARPS, STAGES = 2, 3
COLUMNS, MOST_WARPS = 128, 8
"""Where a program serves several heads: columns of all of them for each of its warps, whose threads keep BLOCK / 32
numbers of a column in registers."""
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
    share = SHARE if heads == 1 else max(SMALLEST_SHARE, SHARE // heads // BLOCK * BLOCK)
    share = max(share, BLOCK * triton.cdiv(R, BLOCK * MOST_SHARES))
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
            H=H, WIDTH=width, BLOCK=BLOCK, STAGES=STAGES, HEADS=heads, PARTS=N // G // heads,
            NORM=norms is not None, TURN=rotary is not None, SHARES=triton.next_power_of_2(shares),
            num_warps=WARPS if heads == 1 else max(WARPS, triton.next_power_of_2(triton.cdiv(heads * width, COLUMNS))),
        )  # fmt: skip
    return out.view(B, N, 1, H)


def heads_of(group: int, width: int) -> int:
    """How many heads of a group of so many a program serves, of a width that is a power of 2."""
    most = max(1, MOST_WARPS * COLUMNS // width)
    return max(heads for heads in range(1, min(group, most) + 1) if group % heads == 0)


@triton.jit(do_not_specialize=["R", "share", "window"])
def _ring_kernel(
    query, key, value, ring_key, ring_value, positions, mixed, statistics, arrivals, result,
    query_gain, key_gain, angles, R, share, window, scale, query_eps, key_eps,
    query_b, query_n, key_b, key_n, value_b, value_n,
    H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    HEADS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Of HEADS heads, whose ring is that of PARTS programs: all of them write the same new token, none waits."""
    b, n, index = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    g = n // PARTS
    position = tl.load(positions + b)
    here = (position % R).to(tl.int32)
    oldest = tl.maximum(position - window + 1, 0)
    column = tl.arange(0, WIDTH)
    inside = column < H
    q = ()
    for i in tl.static_range(HEADS):
        vector = query + b * query_b + (n * HEADS + i) * query_n
        x = _prepared(vector, query_gain, angles + b * H, query_eps, H, WIDTH, NORM, TURN)
        q = q + (x * (scale * LOG2E),)
    head = (b * tl.num_programs(1) + n).to(tl.int64)
    ring_key += head // PARTS * R * H
    ring_value += head // PARTS * R * H
    begin = index * share
    end = tl.minimum(begin + share, R)
    if position < R:  # slots that no token has reached
        end = tl.minimum(end, here + 1)
    if (here >= begin) & (here < end):
        new = here.to(tl.int64) * H + column
        prepared = _prepared(key + b * key_b + g * key_n, key_gain, angles + b * H, key_eps, H, WIDTH, NORM, TURN)
        tl.store(ring_key + new, prepared, inside)
        tl.store(ring_value + new, tl.load(value + b * value_b + g * value_n + column, inside, 0.0), inside)
        tl.debug_barrier()
    highest, total, out = (), (), ()
    for _ in tl.static_range(HEADS):
        highest = highest + (tl.full([BLOCK], -1e30, tl.float32),)
        total = total + (tl.zeros([BLOCK], tl.float32),)
        out = out + (tl.zeros([BLOCK, WIDTH], tl.float32),)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        slot = first + tl.arange(0, BLOCK)
        back = here - slot
        token = position - tl.where(back < 0, back + R, back)
        visible = (slot < end) & (token >= oldest)
        at = slot.to(tl.int64)[:, None] * H + column[None, :]
        read = visible[:, None] & inside[None, :]
        k = tl.load(ring_key + at, read, 0.0)
        v = tl.load(ring_value + at, read, 0.0)
        highest, total, out = _look(q, k, v, visible, highest, total, out, HEADS)
    for i in tl.static_range(HEADS):
        most = tl.max(highest[i], 0)
        weight = tl.exp2(highest[i] - most)
        at = (head * HEADS + i) * tl.num_programs(0) + index
        tl.store(statistics + at * 2, most)
        tl.store(statistics + at * 2 + 1, tl.sum(total[i] * weight, 0))
        tl.store(mixed + at * H + column, tl.sum(out[i] * weight[:, None], 0), inside)
    tl.debug_barrier()  # the stores of all threads come before the one that says so
    if tl.atomic_add(arrivals + head, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + head, 0)
        for i in tl.static_range(HEADS):
            _join(mixed, statistics, result, head * HEADS + i, tl.num_programs(0), H, WIDTH, SHARES, BLOCK)


@triton.jit
def _prepared(vector, gain, angles, eps, H: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr):
    """A new query or key in float32, normed and turned: [WIDTH]."""
    column = tl.arange(0, WIDTH)
    inside = column < H
    x = tl.load(vector + column, inside, 0.0).to(tl.float32)
    if NORM:
        norm = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
        x *= norm * tl.load(gain + column, inside, 0.0).to(tl.float32)
    if TURN:
        other = tl.load(vector + (column ^ 1), inside, 0.0).to(tl.float32)
        if NORM:
            other *= norm * tl.load(gain + (column ^ 1), inside, 0.0).to(tl.float32)
        cos = tl.load(angles + column // 2 * 2, inside, 0.0)
        sin = tl.load(angles + column // 2 * 2 + 1, inside, 0.0)
        x = x * cos + tl.where(column % 2 == 0, -other, other) * sin
    return x


@triton.jit
def _look(q, k, v, visible, highest, total, out, HEADS: tl.constexpr):
    """Each head's softmax goes on over a block of slots."""
    new_highest, new_total, new_out = (), (), ()
    for i in tl.static_range(HEADS):
        s = tl.where(visible, tl.sum(q[i][None, :] * k.to(tl.float32), 1), float("-inf"))
        higher = tl.maximum(highest[i], s)
        p = tl.exp2(s - higher)
        shrink = tl.exp2(highest[i] - higher)
        new_highest = new_highest + (higher,)
        new_total = new_total + (total[i] * shrink + p,)
        new_out = new_out + (out[i] * shrink[:, None] + p[:, None] * v.to(tl.float32),)
    return new_highest, new_total, new_out


@triton.jit
def _join(
    mixed, statistics, result, head, shares,
    H: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the shares of a head together. They were written by other processors: no cache of this one may answer."""
    column = tl.arange(0, WIDTH)
    inside = column < H
    every = tl.arange(0, SHARES)
    at = (head * shares + every) * 2
    peaks = tl.load(statistics + at, every < shares, -1e30, cache_modifier=".cg")
    totals = tl.load(statistics + at + 1, every < shares, 0.0, cache_modifier=".cg")
    highest = tl.max(peaks, 0)
    total = tl.sum(tl.exp2(peaks - highest) * totals, 0)
    out = tl.zeros([WIDTH], tl.float32)
    for first in range(0, shares, BLOCK):
        share = first + tl.arange(0, BLOCK)
        row = head * shares + share
        weight = tl.exp2(tl.load(statistics + row * 2, share < shares, -1e30, cache_modifier=".cg") - highest)
        present = (share < shares)[:, None] & inside[None, :]
        x = tl.load(mixed + row[:, None] * H + column[None, :], present, 0.0, cache_modifier=".cg")
        out += tl.sum(x * weight[:, None], 0)
    tl.store(result + head * H + column, out / total, inside)


settle_names(globals())
