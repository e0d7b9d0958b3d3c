"""The attention kernels on an NVIDIA GPU: right first, then how fast, then which blocks are best.

    PYTHONPATH=src python3 -m benchmarks.gpu_attention [check] [time] [sweep]     (all three by default)

TFLOP/s count useful products only: 2 H floating-point operations for each visible pair of a query and a key, in the
forward 2 products, in the backward 5 (3 where a past takes no gradient), in the second order 15 (11 for such a past).
Kernels that make scores again do more than that; their own rows count what they do.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.ops.attention import hopper, triton as kernels
from longread.ops.attention.reference import reference_attention


class Case(NamedTuple):
    """Sizes of one call; G heads of keys and values, 0 for as many as of queries."""

    name: str
    B: int
    N: int
    T: int
    P: int
    H: int
    window: int
    G: int = 0

    @property
    def pairs(self) -> tuple[int, int]:
        """Visible pairs of a query and a key among own keys and in the past, over all heads."""
        t = torch.arange(self.T)
        own, past = (t + 1).clamp(max=self.window), (self.window - 1 - t).clamp(0, self.P)
        return tuple(int(x.sum()) * self.B * self.N for x in (own, past))  # type: ignore[return-value]

    @property
    def problem(self) -> Any:
        return kernels._Problem(self.T, self.P, min(self.window, self.T + self.P), self.H**-0.5)


SIZES = {"3B": (1, 32, 80), "760M": (1, 16, 96), "125M": (4, 12, 64)}
SUFFIX = [Case(f"{name} P={P}", B, N, 1024, P, H, 8192) for name, (B, N, H) in SIZES.items() for P in (0, 7168, 8192)]
WHOLE = [Case(f"{name} T=32768", 1, N, 32768, 0, H, 8192) for name, (_, N, H) in SIZES.items()]
LONG = [Case(f"{name} T=131072", 1, N, 131072, 0, H, 8192) for name, (_, N, H) in SIZES.items()]


CHECKS = [
    (Case("", 1, 2, 1000, 1500, H, window), dtype, wanted)
    for H in (32, 64, 80, 96, 128)
    for window, dtype, wanted in ((1100, torch.bfloat16, 3), (1 << 20, torch.bfloat16, 5), (333, torch.float32, 3))
]
CHECKS += [
    (Case("", 2, N, 1000, 1500, H, window, G), dtype, wanted)
    for N, G, H in ((9, 3, 64), (4, 1, 128))
    for window, dtype, wanted in ((1100, torch.bfloat16, 5), (333, torch.float32, 3))
]
CHECKS += [
    (Case("", 1, 2, 2049, 0, 80, 700), torch.bfloat16, 3),
    (Case("", 2, 1, 1, 777, 80, 500), torch.bfloat16, 3),
    (Case("", 1, 3, 129, 1, 48, 64), torch.float16, 5),
    (Case("", 1, 2, 1024, 8192, 80, 8192), torch.bfloat16, 3),
    (Case("", 1, 2, 1024, 8192, 64, 8192), torch.bfloat16, 3),
]


# Right.


def draw(case: Case, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """query, key, value inside [B, T, heads, H], as a model makes them, and a past of its own."""
    B, T, H, G = case.B, case.T, case.H, case.G or case.N
    own = [torch.randn(B, T, heads, H, device="cuda", dtype=dtype).transpose(1, 2) for heads in (case.N, G, G)]
    return own + [torch.randn(B, G, case.P, H, device="cuda", dtype=dtype) for _ in range(2)]


def repeated(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of keys and values that are written out for every head of queries."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, past: tuple[Tensor, Tensor] | None, window: int) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v, *older = (x.repeat_interleave(group, 1) for x in (k, v, *(past or ())))
        return f(q, k, v, past=(older[0], older[1]) if older else None, window=window)

    return attend


def derivatives(f: Callable[..., Tensor], tensors: list[Tensor], window: int, wanted: int) -> list[Tensor]:
    """Output, gradients of the first few inputs, and gradients of a scalar made of all that, for all inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    q, k, v, *past = leaves
    generator = torch.Generator().manual_seed(1)

    def weighed(x: Tensor) -> Tensor:
        return (x * torch.randn(x.shape, generator=generator).to(x)).sum()

    out = f(q, k, v, past=(past[0], past[1]) if past and past[0].numel() else None, window=window)
    first = torch.autograd.grad(weighed(out), leaves[:wanted], create_graph=True)
    used = leaves if past and past[0].numel() else leaves[:3]
    second = torch.autograd.grad(sum(weighed(x) for x in (*first, out)), used)
    return [x.detach().double() for x in (out, *first, *second)]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What a kernel does not write is not a number."""
    given = torch.empty_like, Tensor.new_empty

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(math.nan)

    torch.empty_like, Tensor.new_empty = poisoned(given[0]), poisoned(given[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty_like, Tensor.new_empty = given  # type: ignore[assignment]


def check() -> bool:
    """Relative L2 errors against float64, beside those of the reference in the same type."""
    good = True
    for case, dtype, wanted in CHECKS:
        torch.manual_seed(0)
        tensors = draw(case, dtype)
        exact = derivatives(repeated(reference_attention), [x.double() for x in tensors], case.window, wanted)
        plain = derivatives(repeated(reference_attention), tensors, case.window, wanted)
        with poisoned_memory():
            fused = derivatives(kernels.triton_attention, tensors, case.window, wanted)
        errors, allowed = (
            [float((a - e).norm() / e.norm()) for a, e in zip(results, exact, strict=True)]
            for results in (fused, plain)
        )
        bound = 1e-4 if dtype == torch.float32 else None
        fine = all(x <= (bound or 1.5 * y + 1e-3) for x, y in zip(errors, allowed, strict=True))
        again = derivatives(kernels.triton_attention, tensors, case.window, wanted)
        same = all(torch.equal(x, y) for x, y in zip(fused, again, strict=True))
        good &= fine and same
        print(
            f"{'ok ' if fine and same else 'BAD'} {tuple(case[1:])!s:36} {str(dtype)[6:]:9} "
            f"worst error {max(errors):.1e}, of the reference in this type {max(allowed):.1e}"
            + ("" if fine else f"  {[f'{x:.1e}' for x in errors]}")
            + ("" if same else "  RESULTS CHANGE FROM RUN TO RUN"),
            flush=True,
        )
    return good


# Fast.


def milliseconds(f: Callable[[], Any], rep: int = 15) -> float:
    """Median device time, launched from a CUDA graph."""
    import triton

    return triton.testing.do_bench_cudagraph(f, rep=rep, return_mode="median")


def launches(case: Case) -> dict[str, tuple[Callable[[], None], float]]:
    """Each kernel on random tensors, and the floating-point operations that it does."""
    q, k, v, past_k, past_v = draw(case)
    do, a, b, c, *_ = (torch.randn_like(x) for x in (q, q, k, v))
    o = torch.empty_like(q)
    lse, delta, r, phi = (kernels._row_of(q) for _ in range(4))
    out, out_k, out_v, past_out_k, past_out_v = (torch.empty_like(x) for x in (q, k, v, past_k, past_v))
    problem, own, past = case.problem, [k, v], [past_k, past_v]
    tangents = [*own, b, c, *past, None, None]
    own_pairs, past_pairs = case.pairs

    def flops(of_own: int, of_past: int) -> float:
        return 2.0 * case.H * (of_own * own_pairs + of_past * past_pairs)

    def run(name: str, *arguments: Any, **constants: Any) -> Callable[[], None]:
        return lambda: problem.launch(getattr(kernels, f"_{name}_kernel"), *arguments, **constants)

    gain = torch.ones(case.H, device=q.device)
    without_gains, with_gains = ({"H": case.H, "BOUNDED": bounded} for bounded in (False, True))

    statistics = [lse, delta, r, phi]
    made = {
        "forward": (run("forward", [q, o], own + past, [lse, None, None], **without_gains), flops(2, 2)),
        "forward, normed": (run("forward", [q, o], own + past, [lse, gain, gain], **with_gains), flops(2, 2)),
        "query_gradient": (run("query_gradient", [q, o, do, out, None], own + past, [lse, delta]), flops(3, 3)),
        "key_gradient own": (
            run("key_gradient", [q, do], [*own, out_k, out_v, None, None], [lse, delta], False),
            flops(4, 0),
        ),
        "tangent": (run("tangent", [q, a, o, do, out], tangents, [lse, r, phi]), flops(5, 3)),
        "query_second": (run("query_second", [q, a, do, out], tangents, statistics), flops(7, 4)),
        "key_second own": (
            run("key_second", [q, a, do], [*own, b, c, out_k, out_v], statistics, False),
            flops(8, 0),
        ),
    }
    if hopper.overlaps(q, k, gain):
        from longread.ops.attention.overlapped import overlapped_forward

        def overlapped() -> None:
            overlapped_forward(q, k, v, (past_k, past_v), problem.window, problem.scale, (gain, gain), math.inf, o, lse)

        made["forward, overlapped"] = (overlapped, flops(2, 2))
    if case.P:
        made["key_gradient past"] = (
            run("key_gradient", [q, do], [*past, past_out_k, past_out_v, None, None], [lse, delta], True),
            flops(0, 4),
        )
        made["key_second past"] = (
            run("key_second", [q, a, do], [*past, None, None, past_out_k, past_out_v], statistics, True),
            flops(0, 6),
        )
    for f, _ in made.values():  # in this order each finds what it reads
        f()
    return made


def report_times() -> None:
    """Every kernel of every case, then the passes that they make up."""
    for case in (*SUFFIX, *WHOLE, *LONG):
        try:
            own, past = case.pairs
            made = launches(case)
            if case in LONG:
                made = {name: f for name, f in made.items() if name.startswith("forward")}
            elif case in WHOLE:
                shown = "forward", "query_gradient", "key_gradient own"
                made = {name: f for name, f in made.items() if name.startswith(shown)}
            ms = {name: milliseconds(f) for name, (f, _) in made.items()}
            print(f"\n{case.name}  (B={case.B} N={case.N} H={case.H} window={case.window})")
            for name, (_, flops) in made.items():
                print(f"    {name:18} {ms[name]:8.3f} ms {flops / ms[name] / 1e9:6.0f} TFLOP/s")
            passes = {
                "inner backward": (("query_gradient", "key_gradient own"), 5 * own + 3 * past),
                "outer backward": (("query_gradient", "key_gradient own", "key_gradient past"), 5 * (own + past)),
                "second order": (
                    ("tangent", "query_second", "key_second own", "key_second past"),
                    15 * own + 11 * past,
                ),
            }
            for name, (parts, products) in passes.items():
                if parts[0] in ms:
                    total = sum(ms.get(part, 0.0) for part in parts)
                    print(f"  = {name:18} {total:8.3f} ms {2.0 * case.H * products / total / 1e9:6.0f} TFLOP/s useful")
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


# Blocks.

CANDIDATES: dict[str, list[tuple[int, int, int, int]]] = {
    "forward": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2)],
    "query_gradient": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    "key_gradient": [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3)],
    "tangent": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)],
    "query_second": [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2)],
    "key_second": [(64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3)],
}  # fmt: skip


def compile_candidate(task: tuple[str, tuple[int, int, int, int], int]) -> None:
    """In a process of its own: puts a kernel with these blocks into Triton's cache on disk."""
    name, blocks, head_dim = task
    kernels.TABLE[name] = {128: kernels.Blocks(*blocks)}
    for P, window in ((64, 40), (0, 40)):
        case = Case("", 1, 1, 64 if P == 0 else 32, P, head_dim, window)
        with contextlib.suppress(Exception):  # the sweep will say
            make_launches_of(case, name)


def compile_default(task: tuple[Case, torch.dtype, int]) -> None:
    """The same for all kernels as they are, on a small problem that takes the same branches."""
    case, dtype, wanted = task
    window = 20 if case.window < case.T else 50 if case.window < case.T + case.P else 1000
    G = case.G or case.N
    small = case._replace(B=1, N=case.N // G, G=1, T=min(case.T, 40), P=min(case.P, 24), window=window)
    with contextlib.suppress(Exception):
        derivatives(kernels.triton_attention, draw(small, dtype), small.window, wanted)


def in_parallel(f: Callable[[Any], None], tasks: list[Any]) -> None:
    """Triton compiles one kernel at a time; many processes compile many."""
    start = time.time()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(f, tasks))
    print(f"{len(tasks)} configurations compiled in {time.time() - start:.0f} s", flush=True)


def make_launches_of(case: Case, name: str) -> None:
    """Runs the kernels of one name, and no others, on a small case."""
    q, k, v, past_k, past_v = draw(case)
    statistics = [kernels._row_of(q).zero_() for _ in range(4)]
    kernel, problem, past = getattr(kernels, f"_{name}_kernel"), case.problem, [past_k, past_v]
    rows = {
        "forward": lambda: problem.launch(
            kernel, [q, q.clone()], [k, v, *past], [statistics[0], None, None], H=case.H, BOUNDED=False
        ),
        "query_gradient": lambda: problem.launch(kernel, [q, q, q, q.clone(), None], [k, v, *past], statistics[:2]),
        "tangent": lambda: problem.launch(
            kernel, [q, q, q, q, q.clone()], [k, v, k, v, *past, None, None], statistics[:3]
        ),
        "query_second": lambda: problem.launch(
            kernel, [q, q, q, q.clone()], [k, v, k, v, *past, None, None], statistics
        ),
    }
    if name in rows:
        rows[name]()
        return
    new, new_past = [k.clone(), v.clone()], [past_k.clone(), past_v.clone()]
    nothing = [None, None]  # is left for keys and values, or comes for the past's gradients
    if name == "key_gradient":
        queries, used, by_key, by_past = [q, q], statistics[:2], [k, v, *new, *nothing], [*past, *new_past, *nothing]
    else:
        queries, used, by_key, by_past = [q, q, q], statistics, [k, v, k, v, *new], [*past, *nothing, *new_past]
    problem.launch(kernel, queries, by_key, used, False)
    if case.P:
        problem.launch(kernel, queries, by_past, used, True)


def sweep() -> None:
    """Times every candidate on the suffix and on the whole sequence."""
    tasks = [(name, blocks, H) for name, all_ in CANDIDATES.items() for blocks in all_ for _, _, H in SIZES.values()]
    in_parallel(compile_candidate, tasks)
    print("blocks: (queries, keys, warps, stages)")
    table = {name: dict(of) for name, of in kernels.TABLE.items()}
    for size, (B, N, H) in SIZES.items():
        suffix = launches(Case(size, B, N, 1024, 8192, H, 8192))
        whole = launches(Case(size, 1, N, 16384, 0, H, 8192))
        for name, candidates in CANDIDATES.items():
            print(f"  {size:5} {name}")
            for blocks in candidates:
                kernels.TABLE[name] = {128: kernels.Blocks(*blocks)}
                cells = []
                for label, made in (("suffix", suffix), ("whole", whole)):
                    for key, (f, flops) in made.items():
                        if key.split()[0] == name and not (label == "whole" and name in ("tangent", "query_second")):
                            try:
                                ms = milliseconds(f, rep=6)
                                cells.append(f"{label} {key[len(name) :]} {ms:7.3f} ms {flops / ms / 1e9:4.0f}")
                            except Exception as error:
                                cells.append(f"{label} {type(error).__name__}")
                print(f"      {blocks!s:18} {'  |  '.join(cells)}", flush=True)
            kernels.TABLE[name] = table[name]
        del suffix, whole
        torch.cuda.empty_cache()


def main() -> None:
    """Runs the parts named on the command line."""
    parts = {"check": check, "time": report_times, "sweep": sweep}
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    chosen = sys.argv[1:] or list(parts)
    tasks = list(CHECKS) if "check" in chosen else []
    if "time" in chosen:
        tasks += [(case, torch.bfloat16, 3) for case in (*SUFFIX, *WHOLE)]
    if tasks:
        in_parallel(compile_default, sorted(tasks, key=lambda task: (task[1] != torch.float32, -task[0].H)))
    for name in chosen:
        start = time.time()
        print(f"\n== {name}", flush=True)
        try:
            if parts[name]() is False:
                print("WRONG RESULTS: read no times below as a success")
        except Exception:
            traceback.print_exc()
        print(f"== {name} took {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
