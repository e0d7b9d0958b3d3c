"""Attention over a ring for NVIDIA GPUs: bound by memory, so the ring is split among enough programs to keep it busy.

Each program takes the softmax over its share of the slots; a second kernel puts the shares together. The program whose
share holds the new token's slot writes it down before it looks. In a share every row of a block runs a softmax of its
own, over each BLOCK-th slot, and the rows are put together at the end: nothing in the loop waits for another row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
"""Slots that a program looks at together."""
SHARE = 256
"""Slots of a program; more where the ring would have more than `MOST_SHARES`."""
MOST_SHARES = 256
WARPS, STAGES = 2, 3
LOG2E = tl.constexpr(1.4426950408889634)


def triton_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: tuple[Tensor, Tensor],
    position: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """The contract of `longread.ops.attention.ring.ring_attention`."""
    B, N, R, H = ring[0].shape
    share = max(SHARE, BLOCK * triton.cdiv(R, BLOCK * MOST_SHARES))
    shares = triton.cdiv(R, share)
    width = triton.next_power_of_2(H)
    query, key, value = (x.reshape(B, N, H) for x in (query, key, value))
    mixed = torch.empty(B, N, shares, H, device=query.device, dtype=torch.float32)
    statistics = torch.empty(B, N, shares, 2, device=query.device, dtype=torch.float32)
    out = torch.empty(B, N, H, device=query.device, dtype=query.dtype)
    if out.numel():
        _share_kernel[(shares, N, B)](
            query, key, value, *ring, position, mixed, statistics,
            R, share, R if window is None else min(window, R), H**-0.5,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            H=H, WIDTH=width, BLOCK=BLOCK, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
        padded = triton.next_power_of_2(shares)
        warps = 4 if padded <= 64 else 8
        _join_kernel[(N, B)](mixed, statistics, out, shares, H=H, WIDTH=width, SHARES=padded, num_warps=warps)
    return out.view(B, N, 1, H)


@triton.jit(do_not_specialize=["R", "share", "window"])
def _share_kernel(
    query, key, value, ring_key, ring_value, positions, mixed, statistics, R, share, window, scale,
    query_b, query_n, key_b, key_n, value_b, value_n,
    H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, n, index = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    position = tl.load(positions + b)
    here = (position % R).to(tl.int32)
    oldest = tl.maximum(position - window + 1, 0)
    column = tl.arange(0, WIDTH)
    inside = column < H
    q = tl.load(query + b * query_b + n * query_n + column, inside, 0.0).to(tl.float32) * (scale * LOG2E)
    head = (b * tl.num_programs(1) + n).to(tl.int64)
    ring_key += head * R * H
    ring_value += head * R * H
    begin = index * share
    end = tl.minimum(begin + share, R)
    if position < R:  # slots that no token has reached
        end = tl.minimum(end, here + 1)
    if (here >= begin) & (here < end):
        new = here.to(tl.int64) * H + column
        tl.store(ring_key + new, tl.load(key + b * key_b + n * key_n + column, inside, 0.0), inside)
        tl.store(ring_value + new, tl.load(value + b * value_b + n * value_n + column, inside, 0.0), inside)
        tl.debug_barrier()
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        slot = first + tl.arange(0, BLOCK)
        back = here - slot
        token = position - tl.where(back < 0, back + R, back)
        visible = (slot < end) & (token >= oldest)
        at = slot.to(tl.int64)[:, None] * H + column[None, :]
        read = (slot < end)[:, None] & inside[None, :]
        k = tl.load(ring_key + at, read, 0.0)
        v = tl.load(ring_value + at, read, 0.0)
        s = tl.where(visible, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        higher = tl.maximum(highest, s)
        p = tl.exp2(s - higher)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + p
        out = out * shrink[:, None] + p[:, None] * v.to(tl.float32)
        highest = higher
    most = tl.max(highest, 0)
    weight = tl.exp2(highest - most)
    at = head * tl.num_programs(0) + index
    tl.store(statistics + at * 2, most)
    tl.store(statistics + at * 2 + 1, tl.sum(total * weight, 0))
    tl.store(mixed + at * H + column, tl.sum(out * weight[:, None], 0), inside)


@triton.jit(do_not_specialize=["shares"])
def _join_kernel(mixed, statistics, out, shares, H: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr):
    head = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    share, column = tl.arange(0, SHARES), tl.arange(0, WIDTH)
    at = head * shares + share
    highest = tl.load(statistics + at * 2, share < shares, -1e30)
    weight = tl.exp2(highest - tl.max(highest, 0))
    total = tl.sum(weight * tl.load(statistics + at * 2 + 1, share < shares, 0.0), 0)
    present = (share < shares)[:, None] & (column < H)[None, :]
    x = tl.load(mixed + at[:, None] * H + column[None, :], present, 0.0)
    tl.store(out + head * H + column, tl.sum(x * weight[:, None], 0) / total, column < H)
