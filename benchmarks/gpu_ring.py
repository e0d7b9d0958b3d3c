"""Times attention of one new token over a ring of keys and values on a GPU, for the ways to split it among programs.

    python -m benchmarks.gpu_ring [--heads 32] [--kv-heads 32] [--head-dim 80] [--window 8192] [--batch 1 8] [--sweep]

First the gate: at every timed shape the kernel must agree with float64. Times are of 32 rings one after the other, as
in the blocks of a model, in one CUDA graph; the floor is reading every key and value once at the speed of copying
measured in this run. `--sweep` tries other values of the constants of `ring_triton` that decide for these heads.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from unittest import mock

import torch
import triton
from torch import Tensor

from longread.bench.machine import measure_machine, seconds
from longread.ops.attention import ring_triton
from longread.ops.attention.ring import plain_ring_attention

Sweep = dict[str, tuple[int, ...]]
RINGS = 32
REPEATS = 20
TOLERANCE = 1e-2
"""Relative L2 error of bfloat16 outputs."""
PIECES: Sweep = {
    "BLOCK": (16, 32),
    "SHARE": (64, 128, 256, 512),
    "UNROLL": (1, 2, 4),
    "REGISTERS": (128, 168, 200),
    "ENOUGH_PROGRAMS": (0,),  # shares are as told
}
ROWS: Sweep = {"BLOCK": (16, 32, 64), "SHARE": (128, 256, 512, 1024), "WARPS": (2, 4, 8), "STAGES": (1, 3)}
"""Where a program loads whole rows of keys and values."""


def main() -> None:
    """Prints a table, the fastest last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="as many as heads if not given")
    parser.add_argument("--head-dim", type=int, default=80)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda")
    bandwidth = measure_machine(device).bandwidth
    for batch in options.batch:
        shape = batch, options.kv_heads or options.heads, options.window, options.head_dim
        measure(options.heads, shape, device, bandwidth, options.sweep)


def measure(heads: int, shape: tuple[int, int, int, int], device: torch.device, bandwidth: float, sweep: bool) -> None:
    """Prints the times of rings [B, G, R, H] that so many heads look at."""
    B, G, R, H = shape
    rings = [(torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device).bfloat16())]
    rings += [(rings[0][0].clone(), rings[0][1].clone()) for _ in range(RINGS - 1)]
    new = [torch.randn(B, n, 1, H, device=device).bfloat16() for n in (heads, G, G)]
    position = torch.full((B,), 3 * R + 5, device=device)
    floor = 2 * rings[0][0].nbytes / bandwidth
    together = ring_triton.heads_of(heads // G, triton.next_power_of_2(H))
    constants = PIECES if ring_triton.by_pieces(together, H) else ROWS
    found = []
    for values in itertools.product(*constants.values()) if sweep else [[getattr(ring_triton, x) for x in constants]]:
        settings = dict(zip(constants, values, strict=True))
        with mock.patch.multiple(ring_triton, **settings):
            check(new, rings[0], position, R)
            found.append((time_of(lambda: [attend(new, ring, position, R) for ring in rings]), settings))
    for took, settings in sorted(found, key=lambda pair: -pair[0])[-8:]:
        of_one = took / RINGS
        print(f"batch {B} {settings} {1e6 * of_one:.1f} us, {of_one / floor:.2f} x floor", flush=True)


def attend(new: list[Tensor], ring: tuple[Tensor, Tensor], position: Tensor, window: int) -> Tensor:
    return ring_triton.triton_ring_attention(new[0], new[1], new[2], ring, position, window=window)


def check(new: list[Tensor], ring: tuple[Tensor, Tensor], position: Tensor, window: int) -> None:
    """Exits if the kernel is off."""
    found = attend(new, ring, position, window).double()
    query, key, value, *rings = (x.double() for x in (*new, *ring))
    expected = plain_ring_attention(query, key, value, (rings[0], rings[1]), position, window=window)
    off = ((found - expected).norm() / expected.norm()).item()
    if not off <= TOLERANCE:
        raise SystemExit(f"no speed on red: attention over a ring is {off:.2g} off, allowed {TOLERANCE}")


def time_of(work: Callable[[], object]) -> float:
    """Median seconds of a replay of the work as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    graph.replay()
    times = [seconds(torch.device("cuda"), graph.replay) for _ in range(REPEATS)]
    del kept
    return statistics.median(times)


if __name__ == "__main__":
    main()
