"""Norm, gate, rotation, loss and inner step on a GPU: first whether they are right, then how fast.

    python -m benchmarks.gpu_pointwise [--skip-sweep]

Rates count each input and output once, against the measured rate of a copy. Peers are PyTorch's own kernels or, where
it has none, the explicit twins. Everything is timed inside a CUDA graph, so launches cost nothing.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops import tiles
from longread.ops.clipped_sgd import explicit as explicit_sgd, triton as fused_sgd
from longread.ops.clipped_sgd.reference import reference_clipped_sgd
from longread.ops.cross_entropy import chunked, triton as fused_nll
from longread.ops.cross_entropy.reference import reference_cross_entropy
from longread.ops.rms_norm import explicit as explicit_norm, triton as fused_norm
from longread.ops.rms_norm.reference import reference_rms_norm
from longread.ops.rotary import rotation, triton as fused_rotary
from longread.ops.rotary.reference import reference_rotate
from longread.ops.swiglu import explicit as explicit_gate, triton as fused_gate
from longread.ops.swiglu.reference import reference_swiglu

BF16 = torch.bfloat16
VOCABULARY = 128_256
SIZES = {"125m": (768, 12, 1664), "760m": (1536, 16, 3328), "3b": (2560, 32, 5632)}
EPS = 1e-6


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What a kernel does not write is not a number."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


def derivatives(f: Callable[..., Tensor], inputs: list[Tensor], inner: list[int]) -> list[Tensor]:
    """The value, its gradients for the inputs `inner`, and those of a scalar made of both for all inputs."""
    out = f(*inputs)
    first = torch.autograd.grad(
        (out.double() * draw(*out.shape, seed=11)).sum(), [inputs[i] for i in inner], create_graph=True
    )
    mixed = (out.double() * draw(*out.shape, seed=12)).sum()
    mixed = mixed + sum((g.double() * draw(*g.shape, seed=13 + i)).sum() for i, g in enumerate(first))
    return [out, *first, *torch.autograd.grad(mixed, inputs)]


def compare(
    name: str,
    fused: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    inner: list[int],
    peer: Callable[..., Tensor] | None = None,
) -> bool:
    """Relative L2 errors against float64, beside those of the peer in the same type."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = derivatives(definition, wide, inner)

    def errors(f: Callable[..., Tensor]) -> list[float]:
        return [
            ((a.double() - e).norm() / e.norm()).item()
            for a, e in zip(derivatives(f, inputs, inner), expected, strict=True)
        ]

    with poisoned_memory():
        found = errors(fused)
    beside = errors(peer or definition)
    limit = 1e-5 if inputs[0].dtype == torch.float32 else 0.02
    right = all(e <= max(limit, 2 * b) for e, b in zip(found, beside, strict=True))
    print(
        f"{'ok   ' if right else 'WRONG'} {name:44s}",
        " ".join(f"{e:.1e}/{b:.1e}" for e, b in zip(found, beside, strict=True)),
    )
    return right


def check_all() -> None:
    print("relative L2 error against float64: value, first, second derivatives; ours/peer in the same type")
    types = (torch.float32, BF16)
    for dtype, (D, N, _) in itertools.product(types, SIZES.values()):
        attempt("rows", lambda dtype=dtype, D=D, N=N: check_rows(dtype, D, N))
    for dtype, V, limit in itertools.product(types, (VOCABULARY, 50_001), (1 << 30, 1 << 26)):
        attempt("cross_entropy", lambda dtype=dtype, V=V, limit=limit: check_loss(dtype, V, limit))
    for dtype, clip in itertools.product(types, (None, 1.0, 1e9)):
        attempt("clipped_sgd", lambda dtype=dtype, clip=clip: check_step(dtype, clip))


def check_rows(dtype: torch.dtype, D: int, N: int) -> None:
    """Norm, rotation and gate over 333 tokens of width D in N heads."""
    T, H = 333, D // N
    x, y = draw(2, T, D, dtype=dtype), draw(2, T, D, seed=1, dtype=dtype)
    gain, head_gain = draw(D, seed=2), draw(H, seed=3)
    label = f"{str(dtype)[6:]} {D}/{H}"
    single = rotation(10**6, T, H, 5e5, torch.empty(0, device="cuda"))
    norms = fused_norm.triton_rms_norm, reference_rms_norm, explicit_norm.explicit_rms_norm

    def turn(x: Tensor) -> Tensor:
        return single.to(torch.complex128) if x.dtype == torch.float64 else single

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (N, H)).transpose(1, 2)

    def check(name: str, of: Callable[[Any], Callable[..., Tensor]], triple: Any, inputs: list[Tensor]) -> None:
        ours, definition, peer = triple
        inner = list(range(len(inputs))) if name in ("rms_norm", "swiglu") else [0]
        attempt(name, lambda: compare(f"{name} {label}", of(ours), of(definition), inputs, inner, of(peer)))

    check("rms_norm", lambda f: lambda x, g: f(x, g, EPS), norms, [x, gain])
    check("rms_norm + residual", lambda f: lambda x, g, r: f(x, g, EPS, residual=r), norms, [x, gain, y])
    check("norm and turn", lambda f: lambda x, g: f(split(x), g, EPS, turn=turn(x)), norms, [x, head_gain])
    rotations = fused_rotary.triton_rotate, reference_rotate, reference_rotate
    check("rotate", lambda f: lambda x: f(split(x), turn(x)) ** 3, rotations, [x])
    gates = fused_gate.triton_swiglu, reference_swiglu, explicit_gate.explicit_swiglu
    check("swiglu", lambda f: f, gates, [x, y])


def check_loss(dtype: torch.dtype, V: int, limit: int) -> None:
    T, D = 203, 512
    targets = torch.randint(V, (T,), device="cuda")
    h = draw(T, D, dtype=dtype)
    head = draw(V, D, seed=1, dtype=dtype, scale=2 * D**-0.5)

    def of(f: Any) -> Callable[..., Tensor]:
        return lambda h, e: f(h, e, targets)

    with mock.patch.object(fused_nll, "LOGITS_BYTES", limit):
        name = f"cross_entropy {str(dtype)[6:]} V {V} {'kept' if limit > 1 << 28 else 'made again'}"
        compare(
            name,
            of(fused_nll.triton_cross_entropy),
            of(reference_cross_entropy),
            [h, head],
            [0],
            of(chunked.chunked_cross_entropy),
        )


def check_step(dtype: torch.dtype, clip: float | None) -> None:
    shapes = [(3, 1665, 767), (3, 768, 1664), (3, 5)]
    weights = [draw(1665, 767).expand(3, -1, -1), *(draw(*s, seed=i) for i, s in enumerate(shapes[1:], 1))]
    gradients = [draw(*s, seed=9 + i, dtype=dtype, scale=1e-3) for i, s in enumerate(shapes)]
    with torch.no_grad():
        for g in gradients:
            g[0] *= 1e-3

    def run(f: Any, weights: list[Tensor], gradients: list[Tensor], lr: Any) -> list[Tensor]:
        new, norm = f(weights, gradients, lr=lr, clip=clip)
        total = sum((w.double() * draw(*w.shape, seed=5 + i)).sum() for i, w in enumerate(new))
        return [*new, norm, *torch.autograd.grad(total, weights + gradients)]

    wide = [[x.detach().double().requires_grad_() for x in group] for group in (weights, gradients)]
    expected = run(reference_clipped_sgd, *wide, 0.7)
    with poisoned_memory():
        found = run(fused_sgd.triton_clipped_sgd, weights, gradients, torch.tensor(0.7, device="cuda"))
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, expected, strict=True)]
    right = max(errors) <= (1e-5 if dtype == torch.float32 else 0.005)
    print(f"{'ok   ' if right else 'WRONG'} clipped_sgd {str(dtype)[6:]} clip {clip}: {max(errors):.1e}")


def attempt(name: str, what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception:  # one failing part must not hide the others
        print(f"WRONG {name} failed")
        traceback.print_exc()
        return None


def milliseconds(what: Callable[[], Any], rep: int = 20) -> float:
    benchmark = importlib.import_module("triton.testing").do_bench_cudagraph
    with torch.no_grad():
        return benchmark(what, rep=rep, return_mode="median")


def row(name: str, nbytes: float, ours: Callable[[], Any], peer: Callable[[], Any] | None = None) -> None:
    def measured(what: Callable[[], Any] | None) -> str:
        if what is None:
            return " " * 21
        try:
            ms = milliseconds(what)
        except Exception as error:
            return f" {type(error).__name__:>20s}"
        return f"{ms * 1e3:9.1f} us {nbytes / ms / 1e6:6.0f} GB/s"

    print(f"{name:52s} {measured(ours)}   {measured(peer)}", flush=True)


def second(function: Any, saved: tuple[Any, ...], *cotangents: Any, **more: Any) -> Callable[[], Any]:
    """The backward of a Function as autograd would call it, without autograd."""
    ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True,) * 32, next_functions=(), **more)
    return lambda: function.backward(ctx, *cotangents)


def time_copy() -> None:
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    row("copy of 1 GiB", 2 * source.nbytes, lambda: target.copy_(source))


def time_norms(size: str, tokens: int) -> None:
    D, N, _ = SIZES[size]
    H = D // N
    x, dy, u, r = (draw(1, tokens, D, seed=i, dtype=BF16).detach() for i in range(4))
    gain, head_gain = torch.ones(D, device="cuda"), torch.ones(H, device="cuda")
    once = x.nbytes
    ours, theirs = fused_norm, explicit_norm
    scale = torch.ones(tokens, device="cuda")
    narrow = gain.to(BF16)
    wide, wide_dy, wide_u, wide_scale = x.float(), dy.float(), u.float(), scale.view(1, tokens, 1)
    s = wide_scale * 0.1
    row(
        f"{size} rms_norm forward [{tokens}, {D}]",
        2 * once,
        lambda: ours.triton_rms_norm(x, gain, EPS),
        lambda: F.rms_norm(x, (D,), narrow, EPS),
    )
    row(
        "  with residual",
        3 * once,
        lambda: ours.triton_rms_norm(x, gain, EPS, residual=r),
        lambda: r + F.rms_norm(x, (D,), narrow, EPS),
    )
    for flag in (False, True):
        row(
            f"  backward{' with gain' if flag else ''}",
            3 * once,
            lambda flag=flag: ours._NormGradient.apply(x, gain, dy, scale, None, flag),
            lambda flag=flag: theirs._NormGradient.apply(wide, gain, wide_dy, wide_scale, flag),
        )
    row(
        "  second order",
        5 * once,
        second(ours._NormGradient, (x, gain, dy, scale, None), u, None),
        second(theirs._NormGradient, (wide, gain, wide_dy, wide_scale, s), wide_u, None),
    )

    heads, heads_dy, heads_u = (t.unflatten(-1, (N, H)).transpose(1, 2) for t in (x, dy, u))
    turn = rotation(0, tokens, H, 5e5, x)
    table, head_scale = fused_rotary.table_of(turn, heads), torch.ones(tokens * N, device="cuda")
    row(
        f"  heads of {H}, turned: forward",
        2 * once,
        lambda: ours.triton_rms_norm(heads, head_gain, EPS, turn=turn),
        lambda: theirs.explicit_rms_norm(heads, head_gain, EPS),
    )
    row(
        "    backward", 3 * once, lambda: ours._NormGradient.apply(heads, head_gain, heads_dy, head_scale, table, False)
    )
    dense = heads_dy.contiguous()
    row(
        "    backward, dy [B, N, T, H]",
        3 * once,
        lambda: ours._NormGradient.apply(heads, head_gain, dense, head_scale, table, False),
    )
    row(
        "    second order",
        5 * once,
        second(ours._NormGradient, (heads, head_gain, heads_dy, head_scale, table), heads_u, None),
    )
    row(
        f"  rotate heads of {H}",
        2 * once,
        lambda: fused_rotary.triton_rotate(heads, turn),
        lambda: reference_rotate(heads, turn),
    )


def time_gate(size: str, tokens: int) -> None:
    _, _, hidden = SIZES[size]
    a, b, dh, u, v = (draw(tokens, hidden, seed=i, dtype=BF16).detach() for i in range(5))
    ours, theirs = fused_gate, explicit_gate
    row(
        f"{size} swiglu forward [{tokens}, {hidden}]",
        3 * a.nbytes,
        lambda: ours.triton_swiglu(a, b),
        lambda: theirs.explicit_swiglu(a, b),
    )
    row(
        "  backward",
        5 * a.nbytes,
        lambda: ours._GateGradient.apply(a, b, dh),
        lambda: theirs._GateGradient.apply(a, b, dh),
    )
    row("  second order", 8 * a.nbytes, *(second(m._GateGradient, (a, b, dh), u, v) for m in (ours, theirs)))


def time_loss(size: str, tokens: int) -> None:
    D, V, f = SIZES[size][0], VOCABULARY, fused_nll
    h, head = draw(tokens, D, dtype=BF16).detach(), draw(V, D, seed=1, dtype=BF16, scale=D**-0.5).detach()
    targets = torch.randint(V, (tokens,), device="cuda")
    logits, tangents = (
        torch.empty(tokens, V, device="cuda", dtype=BF16),
        torch.empty(tokens, V, device="cuda", dtype=BF16),
    )
    torch.mm(h, head.t(), out=logits)
    torch.mm(h, head.t(), out=tangents)
    nll, log_sum, p_target, w, mean = (torch.full((tokens,), 1e-3, device="cuda") for _ in range(5))
    slope, a = torch.zeros_like(h, dtype=torch.float32), h * 1e-3
    once, product = logits.nbytes, 2 * tokens * V * D
    print(f"{size} cross-entropy, {tokens} tokens, D {D}; elementwise kernels:")
    row("  log-sum-exp", once, lambda: f._losses(logits, h, head, targets, nll, log_sum, p_target, False))
    row(
        "  log-sum-exp and p − onehot",
        2 * once,
        lambda: f._losses(logits, h, head, targets, nll, log_sum, p_target, True),
        lambda: F.cross_entropy(logits, targets, reduction="none"),
    )
    row(
        "  logits again -> p − onehot",
        2 * once,
        lambda: f._adjoints(logits, logits, targets, log_sum, None, None, None),
    )
    row("  second order, kept", 3 * once, lambda: f._adjoints(logits, tangents, targets, None, p_target, w, mean))
    row(
        "  second order, logits again", 4 * once, lambda: f._adjoints(logits, tangents, targets, log_sum, None, w, mean)
    )
    print("  whole calls, with products:                              ours              peer (chunked)")

    def whole(name: str, products: int, ours: Callable[[], Any], peer: Callable[[], Any]) -> None:
        times = [milliseconds(what) for what in (ours, peer)]
        rates = [products * product / t / 1e9 for t in times]
        print(
            f"  {name:50s} {times[0]:7.3f} ms {rates[0]:4.0f} TFLOP/s   {times[1]:7.3f} ms {rates[1]:4.0f} TFLOP/s",
            flush=True,
        )

    whole(
        "one product z = h Eᵀ (peer: in float32 out, p E)",
        1,
        lambda: torch.mm(h, head.t(), out=tangents),
        lambda: f._product_in_float32(tangents, head),
    )
    whole(
        "forward and inner gradient",
        2,
        lambda: f._NLL.apply(h, head, targets, True),
        lambda: first_order(h, head, targets, w),
    )
    torch.mm(h, head.t(), out=logits)
    f._losses(logits, h, head, targets, nll, log_sum, p_target, True)
    peer = second(chunked.NLLGradient, (h, head, w, targets, log_sum), h, None)
    whole(
        "outer gradient, kept (peer: without the ordinary)",
        4,
        lambda: f._second_order(h, head, targets, log_sum, p_target, slope, logits, w, a, True),
        peer,
    )
    whole(
        "outer gradient, logits again",
        5,
        lambda: f._second_order(h, head, targets, log_sum, p_target, slope, None, w, a, True),
        peer,
    )
    whole(
        "head gradient of first order, kept",
        1,
        lambda: f._head_gradient(h, head, targets, log_sum, logits, w),
        lambda: chunked.NLLGradient.apply(h, head, w, targets, log_sum, (False, True)),
    )


def first_order(h: Tensor, head: Tensor, targets: Tensor, w: Tensor) -> Any:
    chunked.chunked_cross_entropy(h, head, targets)
    return chunked.NLLGradient.apply(h, head, w, targets, w, (True, False))


def time_step(size: str, sequences: int) -> None:
    D, _, hidden = SIZES[size]
    shapes = [(sequences, hidden, D), (sequences, hidden, D), (sequences, D, hidden)]
    weights = [draw(*s, seed=i).detach() for i, s in enumerate(shapes)]
    lr = torch.tensor(1.0, device="cuda")
    for dtype in (torch.float32, BF16):
        gradients = [draw(*s, seed=5 + i, dtype=dtype).detach() for i, s in enumerate(shapes)]
        count = sum(w.numel() for w in weights)
        g = dtype.itemsize
        same = dtype == torch.float32
        row(
            f"{size} clipped_sgd forward, {sequences} x 3 matrices, g {str(dtype)[6:]}",
            count * (2 * g + 8),
            lambda gradients=gradients: fused_sgd._Step.apply(lr, 1.0, *weights, *gradients),
            (lambda gradients=gradients: explicit_sgd._Step.apply(1.0, 1.0, *weights, *gradients)) if same else None,
        )
        norm = torch.full((sequences,), 2.0, device="cuda")
        row(
            "  backward",
            count * (3 * g + 8),
            second(fused_sgd._Step, (norm, norm, *gradients), *weights, None, clip=1.0),
            second(explicit_sgd._Step, (norm, norm, *gradients), *weights, None, clip=1.0, lr=1.0) if same else None,
        )


def sweep(name: str, module: Any, choices: list[dict[str, int]], cases: dict[str, Callable[[], Any]]) -> None:
    """Times each case with each setting of the module's constants."""
    print(f"sweep {name}: {', '.join(cases)} (us)")
    for choice in choices:
        found = []
        with mock.patch.multiple(module, **choice):
            for what in cases.values():
                try:
                    found.append(f"{milliseconds(what, rep=8) * 1e3:9.1f}")
                except Exception as error:
                    found.append(f" {type(error).__name__}")
        print("   ", choice, *found, flush=True)


def norm_cases(size: str) -> dict[str, Callable[[], Any]]:
    f, (D, N, _) = fused_norm, SIZES[size]
    x, dy, u = (draw(1, 8192, D, seed=i, dtype=BF16).detach() for i in range(3))
    gain, scale, head_scale = (torch.ones(n, device="cuda") for n in (D, 8192, 8192 * N))
    heads, heads_dy, heads_u = (t.unflatten(-1, (N, -1)).transpose(1, 2) for t in (x, dy, u))
    turn = rotation(0, 8192, D // N, 5e5, x)
    table, head_gain = fused_rotary.table_of(turn, heads), torch.ones(D // N, device="cuda")
    return {
        f"{size} forward": lambda: f.triton_rms_norm(x, gain, EPS),
        f"{size} backward and gain": lambda: f._NormGradient.apply(x, gain, dy, scale, None, True),
        f"{size} second": second(f._NormGradient, (x, gain, dy, scale, None), u, None),
        f"{size} heads forward": lambda: f.triton_rms_norm(heads, head_gain, EPS, turn=turn),
        f"{size} heads second": second(f._NormGradient, (heads, head_gain, heads_dy, head_scale, table), heads_u, None),
    }


def sweeps() -> None:
    settings = [(1024, 512), (2048, 512), (4096, 512), (2048, 256), (4096, 1024)]
    sweep(
        "norm",
        tiles,
        [{"SMALLEST_TILE": t, "ELEMENTS_PER_WARP": e} for t, e in settings],
        norm_cases("125m") | norm_cases("3b"),
    )

    a, b, dh, u, v = (draw(8192, 5632, seed=i, dtype=BF16).detach() for i in range(5))
    sweep(
        "swiglu",
        fused_gate,
        [{"BLOCK": block, "WARPS": warps} for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))],
        {
            "forward": lambda: fused_gate.triton_swiglu(a, b),
            "second": second(fused_gate._GateGradient, (a, b, dh), u, v),
        },
    )

    T, V = 1024, VOCABULARY
    h, head = draw(T, 768, dtype=BF16).detach(), draw(V, 768, seed=1, dtype=BF16, scale=0.03).detach()
    logits = h @ head.t()
    tangents, targets = logits.clone(), torch.randint(V, (T,), device="cuda")
    nll, log_sum, p_target, w = (torch.full((T,), 1e-3, device="cuda") for _ in range(4))

    def losses(to_residuals: bool) -> Callable[[], Any]:
        return lambda: fused_nll._losses(logits, h, head, targets, nll, log_sum, p_target, to_residuals)

    settings = [(4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)]
    sweep(
        "losses",
        fused_nll,
        [{"LOSS_BLOCK": block, "LOSS_WARPS": warps} for block, warps in settings],
        {"log-sum-exp": losses(False), "and p − onehot": losses(True)},
    )
    sweep(
        "adjoints",
        fused_nll,
        [{"BLOCK": block, "WARPS": warps} for block, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8))],
        {"second order": lambda: fused_nll._adjoints(logits, tangents, targets, None, p_target, w, w)},
    )

    weights, gradients = ([draw(1, 5632, 2560, seed=i).detach()] for i in range(2))
    norm = torch.full((1,), 2.0, device="cuda")
    sweep(
        "clipped_sgd",
        fused_sgd,
        [{"BLOCK": block, "WARPS": warps} for block, warps in ((2048, 4), (2048, 8), (4096, 8), (8192, 8))],
        {
            "forward": lambda: fused_sgd._Step.apply(1.0, 1.0, *weights, *gradients),
            "backward": second(fused_sgd._Step, (norm, norm, *gradients), *weights, None, clip=1.0),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-sweep", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    attempt("checks", check_all)
    torch.cuda.empty_cache()
    print(f"\n[{time.perf_counter() - started:.0f} s] {'':46s} ours                    peer")
    attempt("copy", time_copy)
    for size, tokens in (("125m", 8192), ("3b", 8192), ("3b", 1024)):
        attempt("norms", lambda size=size, tokens=tokens: time_norms(size, tokens))
        attempt("gate", lambda size=size, tokens=tokens: time_gate(size, tokens))
    for size, tokens in (("125m", 4096), ("3b", 1024)):
        attempt("loss", lambda size=size, tokens=tokens: time_loss(size, tokens))
        torch.cuda.empty_cache()
    for size, sequences in (("125m", 4), ("3b", 1)):
        attempt("step", lambda size=size, sequences=sequences: time_step(size, sequences))
    print(f"[{time.perf_counter() - started:.0f} s]")
    if not arguments.skip_sweep:
        attempt("sweeps", sweeps)
        print(f"[{time.perf_counter() - started:.0f} s]")


if __name__ == "__main__":
    main()
