"""Attention whose heads share keys and values, on an NVIDIA GPU: right first, then how fast beside repeating them.

    PYTHONPATH=src python3 -m benchmarks.gpu_shared_heads

The gate compares with float64 and with keys and values written out for every head: the kernels to the second order,
what else answers to the first, and a ring. Then, for each size, milliseconds of the forward pass, of the inner gradient
(of queries and own keys and values) and of the second order (the gradient of both with respect to everything), each
launched from a CUDA graph:

shared     as the library does it
repeated   keys, values and past repeated in each call, their gradients summed: `repeat_interleave`
written    as many heads of keys and values as of queries from the start: N / G times the memory of a past

and microseconds of a token over a ring. The last lines are the kernels of keys, whose programs are fewer when shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_attention import (
    Case,
    compile_default,
    derivatives,
    draw,
    in_parallel,
    launches,
    milliseconds,
    poisoned_memory,
    repeated,
)
from longread.ops.attention import attention, triton as kernels
from longread.ops.attention.reference import reference_attention
from longread.ops.attention.ring import plain_ring_attention, ring_attention

BF16, FLOAT32 = torch.bfloat16, torch.float32
NINE, THIRTY_TWO = (9, 64, 3), (32, 128, 8)  # heads, head dim, heads of keys and values


def case(name: str, B: int, T: int, P: int, window: int, sizes: tuple[int, int, int]) -> Case:
    N, H, G = sizes
    return Case(f"{N}/{G} of {H}, {name}", B, N, T, P, H, window, G)


TIMED = [
    case("mini-batch, 1 sequence", 1, 256, 1024, 1024, NINE),
    case("mini-batch, 8 sequences", 8, 256, 1024, 1024, NINE),
    case("8192 tokens, window 1024", 8, 8192, 0, 1024, NINE),
    case("mini-batch, 1 sequence", 1, 1024, 8192, 8192, THIRTY_TWO),
    case("mini-batch, 8 sequences", 8, 256, 1024, 1024, THIRTY_TWO),
    case("8192 tokens, window 1024", 1, 8192, 0, 1024, THIRTY_TWO),
]
SECOND = [
    (Case("", 2, N, 500, 700, H, window, G), dtype, wanted)
    for N, H, G in (NINE, (8, 128, 2))
    for window, dtype, wanted in ((600, BF16, 5), (1 << 20, BF16, 3), (333, FLOAT32, 5))
]
FIRST = [
    (Case("", 2, N, T, P, H, window, G), dtype)
    for dtype in (BF16, FLOAT32)
    for N, H, G in (NINE, (4, 256, 1))
    for T, P, window in ((512, 0, 512), (512, 0, 100), (100, 300, 200))
]
RINGS = [(1, 1024, NINE), (8, 1024, NINE), (1, 8192, THIRTY_TWO), (8, 8192, THIRTY_TWO)]


def gate() -> bool:
    """Relative L2 errors against float64, beside those of the definition in the same type."""
    good = True
    for sizes, dtype, wanted in SECOND:
        good &= compare(sizes, dtype, lambda f, x, c=sizes, n=wanted: derivatives(f, x, c.window, n), "order 2")
    for sizes, dtype in FIRST:
        good &= compare(sizes, dtype, lambda f, x, c=sizes: gradients(f, x, c.window), "order 1")
    for B, R, sizes in RINGS:
        new, ring, position = ring_of(B, R, sizes)
        out = ring_attention(*new, ring, position, window=R).double()
        exact = plain_ring_attention(
            *(x.double() for x in new), (ring[0].double(), ring[1].double()), position, window=R
        )
        error = float((out - exact).norm() / exact.norm())
        good &= error < 1e-2
        print(f"{'ok ' if error < 1e-2 else 'BAD'} ring      {B} x {R} of {sizes!s:14} error {error:.1e}")
    return good


def compare(
    sizes: Case, dtype: torch.dtype, results: Callable[[Callable[..., Tensor], list[Tensor]], list[Tensor]], name: str
) -> bool:
    """Prints a line, and says whether it is a good one."""
    torch.manual_seed(0)
    tensors = draw(sizes, dtype)
    exact = results(repeated(reference_attention), [x.double() for x in tensors])
    plain = results(repeated(reference_attention), tensors)
    if name == "order 2":
        with poisoned_memory():
            found = results(kernels.triton_attention, tensors)
        again = results(kernels.triton_attention, tensors)
        same = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    else:
        found, same = results(lambda *x, **options: attention(*x, **options, order=1), tensors), True
    errors, allowed = (
        [float((a - e).norm() / e.norm()) for a, e in zip(some, exact, strict=True)] for some in (found, plain)
    )
    fine = same and all(x <= max(1e-4, 1.5 * y + 1e-3 * (dtype == BF16)) for x, y in zip(errors, allowed, strict=True))
    print(
        f"{'ok ' if fine else 'BAD'} {name}   {tuple(sizes[1:])!s:40} {str(dtype)[6:]:9} worst {max(errors):.1e}, "
        f"of the definition {max(allowed):.1e}{'' if same else ', CHANGES FROM RUN TO RUN'}",
        flush=True,
    )
    return fine


def gradients(f: Callable[..., Tensor], tensors: list[Tensor], window: int) -> list[Tensor]:
    """Output, and gradients of everything."""
    leaves = [x.detach().requires_grad_() for x in tensors if x.numel()]
    q, k, v, *past = leaves
    out = f(q, k, v, past=(past[0], past[1]) if past else None, window=window)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, cotangent))]


# Fast.


def passes(f: Callable[..., Tensor], sizes: Case) -> list[Callable[[], Any]]:
    """The forward pass; with the inner gradient; with the second order."""
    leaves = [x.detach().requires_grad_() for x in draw(sizes) if x.numel()]
    q, k, v, *past = leaves

    def forward() -> Tensor:
        return f(q, k, v, past=(past[0], past[1]) if past else None, window=sizes.window)

    def inner() -> tuple[Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, leaves[:3], out.detach(), create_graph=True)

    def outer() -> tuple[Tensor, ...]:
        results = inner()
        return torch.autograd.grad(results, leaves, tuple(x.detach() for x in results))

    return [forward, inner, outer]


def report() -> None:
    """Prints the table."""
    print(f"\n{'milliseconds':44} {'forward':>10} {'gradient':>10} {'second':>10} {'all':>10}")
    for sizes in TIMED:
        ways = {
            "shared": (kernels.triton_attention, sizes),
            "repeated": (repeated(kernels.triton_attention), sizes),
            "written": (kernels.triton_attention, sizes._replace(G=0)),
        }
        for way, (f, given) in ways.items():
            first, second, third = (milliseconds(work, rep=10) for work in passes(f, given))
            parts = "".join(f"{x:11.3f}" for x in (first, second - first, third - second, third))
            print(f"{sizes.name:34} {way:9}{parts}", flush=True)
            torch.cuda.empty_cache()
    print("\nmicroseconds of a token over a ring (in one graph of 8 rings)")
    for B, R, sizes in RINGS:
        times = []
        for N, H, G in (sizes, (*sizes[:2], sizes[0])):
            rings = [ring_of(B, R, (N, H, G)) for _ in range(8)]
            times.append(milliseconds(lambda rings=rings, R=R: [ring_attention(*x, window=R) for x in unpacked(rings)]))
        shared, written = (1e3 * x / 8 for x in times)
        print(f"{B} x {R} of {sizes!s:14} shared {shared:7.1f}   written {written:7.1f}", flush=True)
        del rings
    print("\nmicroseconds of kernels of keys, shared / written")
    for sizes in TIMED:
        if sizes.P:
            both = [launches(given) for given in (sizes, sizes._replace(G=0))]
            names = [name for name in both[0] if name.startswith("key")]
            cells = [f"{name} {' / '.join(f'{1e3 * milliseconds(x[name][0], 6):.0f}' for x in both)}" for name in names]
            print(f"{sizes.name:34} {'   '.join(cells)}", flush=True)
            torch.cuda.empty_cache()


def ring_of(B: int, R: int, sizes: tuple[int, int, int]) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """A token, a full ring, and the token's position."""
    N, H, G = sizes
    new = [torch.randn(B, heads, 1, H, device="cuda", dtype=BF16) for heads in (N, G, G)]
    ring = torch.randn(2, B, G, R, H, device="cuda", dtype=BF16)
    return new, (ring[0], ring[1]), torch.full((B,), 3 * R + 5, device="cuda")


def unpacked(rings: list[tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]]) -> list[tuple[Any, ...]]:
    return [(*new, ring, position) for new, ring, position in rings]


def tasks() -> list[tuple[Case, torch.dtype, int]]:
    """What is to be compiled, each variant of the kernels once."""
    timed = [(given, BF16, 3) for sizes in TIMED for given in (sizes, sizes._replace(G=0))]
    first = [(*pair, 3) for pair in FIRST if pair[0].H <= 128 and pair[0].window < pair[0].T + pair[0].P]
    variants = {}
    for sizes, dtype, wanted in (*timed, *first, *SECOND):
        T, P, window = sizes.T, sizes.P, sizes.window
        group = sizes.N // (sizes.G or sizes.N)
        variants[sizes.H, group, dtype, P > 0, window < T, window < T + P] = sizes, dtype, wanted
    return list(variants.values())


def main() -> None:
    """The gate, then the table."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    in_parallel(compile_default, tasks())
    if not gate():
        raise SystemExit("no speed on red")
    report()


if __name__ == "__main__":
    main()
