"""Two kernels: of each block of a row its largest number and the sum of exponentials below it; then those of the row.

Sums are in one order, so they are the same in every run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from longread.ops.precompile import settle_names

BLOCK, WARPS = 2048, 4
"""Numbers of a row in a program."""


def triton_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.likeliest.likeliest`, for at most float32."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    B, V = logits.shape
    blocks = triton.cdiv(V, BLOCK)
    ids = torch.empty(B, dtype=torch.long, device=logits.device)
    log_p = torch.empty_like(ids, dtype=logits.dtype)
    places = torch.empty(B, blocks, dtype=torch.int32, device=logits.device)
    peaks, totals = (torch.empty_like(places, dtype=torch.float32) for _ in range(2))
    _look_at_block[(blocks, B)](logits, places, peaks, totals, V, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    _look_at_row[(B,)](places, peaks, totals, ids, log_p, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1)
    return ids, log_p


@triton.jit
def _first_largest(x, place):
    """Of x the largest, where it lies, and what to subtract before exponentials are taken, so that they are finite."""
    missing = x != x
    peak = tl.max(tl.where(missing, float("-inf"), x), 0)
    peak = tl.where(tl.max(missing.to(tl.int32), 0) > 0, float("nan"), peak)
    first = tl.min(tl.where((x == peak) | missing, place, 2**31 - 1), 0)
    return peak, first, tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _look_at_block(logits, places, peaks, totals, V, row, BLOCK: tl.constexpr):
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b * row + place, place < V, float("-inf")).to(tl.float32)
    peak, first, shift = _first_largest(x, place)
    at = b * tl.num_programs(0) + block
    tl.store(places + at, first)
    tl.store(peaks + at, peak)
    tl.store(totals + at, tl.sum(tl.exp(x - shift), 0))


@triton.jit
def _look_at_row(places, peaks, totals, ids, log_p, blocks, BLOCKS: tl.constexpr):
    b, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    at, there = b * blocks + block, block < blocks
    x = tl.load(peaks + at, there, float("-inf"))
    peak, first, shift = _first_largest(x, tl.load(places + at, there, 2**31 - 1))
    total = tl.sum(tl.load(totals + at, there, 0.0) * tl.exp(x - shift), 0)
    tl.store(ids + b, first.to(tl.int64))
    tl.store(log_p + b, peak - shift - tl.log(total))


settle_names(globals())
