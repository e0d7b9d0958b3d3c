"""Norm, gate, rotation, loss and inner step on a GPU: first whether they are right, then how fast.

    python -m benchmarks.gpu_pointwise [--skip-sweep]

Rates count each input and output once, against the measured rate of a copy. Peers are PyTorch's own kernels or, where
it has none, the explicit twins. Everything is timed inside a CUDA graph, so launches cost nothing.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_pointwise_gate import BF16, EPS, SIZES, VOCABULARY, attempt, check_all, draw
from longread.ops import tiles
from longread.ops.clipped_sgd import explicit as explicit_sgd, triton as fused_sgd
from longread.ops.cross_entropy import chunked, triton as fused_nll
from longread.ops.rms_norm import explicit as explicit_norm, triton as fused_norm
from longread.ops.rotary import frequencies, rotation, triton as fused_rotary
from longread.ops.rotary.reference import reference_rotate
from longread.ops.swiglu import explicit as explicit_gate, triton as fused_gate


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
    ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True,) * 32, next_functions=((None, 0),) * 32, **more)
    return lambda: function.backward(ctx, *cotangents)


def norm_gradient(x: Tensor, gain: Tensor, dy: Tensor, scale: Tensor, table: Tensor | None, with_gain: bool) -> Any:
    """That of the kernels, where nothing else comes for x."""
    return fused_norm._NormGradient.apply(x, gain, dy, None, None, scale, table, None, with_gain, False)


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
            lambda flag=flag: norm_gradient(x, gain, dy, scale, None, flag),
            lambda flag=flag: theirs._NormGradient.apply(wide, gain, wide_dy, wide_scale, flag),
        )
    row(
        "  second order",
        5 * once,
        second(ours._NormGradient, (x, gain, dy, scale, None), u, None, None, sums=None),
        second(theirs._NormGradient, (wide, gain, wide_dy, wide_scale, s), wide_u, None),
    )

    heads, heads_dy, heads_u = (t.unflatten(-1, (N, H)).transpose(1, 2) for t in (x, dy, u))
    rotary = rotation(0, tokens, frequencies(H, 5e5, device="cuda"), x)
    table, head_scale = fused_rotary.table_of(rotary, heads), torch.ones(tokens * N, device="cuda")
    row(
        f"  heads of {H}, turned: forward",
        2 * once,
        lambda: ours.triton_rms_norm(heads, head_gain, EPS, rotary=rotary),
        lambda: theirs.explicit_rms_norm(heads, head_gain, EPS),
    )
    row("    backward", 3 * once, lambda: norm_gradient(heads, head_gain, heads_dy, head_scale, table, False))
    dense = heads_dy.contiguous()
    row(
        "    backward, dy [B, N, T, H]",
        3 * once,
        lambda: norm_gradient(heads, head_gain, dense, head_scale, table, False),
    )
    row(
        "    second order",
        5 * once,
        second(ours._NormGradient, (heads, head_gain, heads_dy, head_scale, table), heads_u, None, None, sums=None),
    )
    row(
        f"  rotate heads of {H}",
        2 * once,
        lambda: fused_rotary.triton_rotate(heads, rotary),
        lambda: reference_rotate(heads, rotary),
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
        lambda: ours._GateGradient.apply(a, b, dh, "silu"),
        lambda: theirs._GateGradient.apply(a, b, dh, "silu"),
    )
    row(
        "  second order",
        8 * a.nbytes,
        *(second(m._GateGradient, (a, b, dh), u, v, activation="silu") for m in (ours, theirs)),
    )


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
    rotary = rotation(0, 8192, frequencies(D // N, 5e5, device="cuda"), x)
    table, head_gain = fused_rotary.table_of(rotary, heads), torch.ones(D // N, device="cuda")
    return {
        f"{size} forward": lambda: f.triton_rms_norm(x, gain, EPS),
        f"{size} backward and gain": lambda: norm_gradient(x, gain, dy, scale, None, True),
        f"{size} second": second(f._NormGradient, (x, gain, dy, scale, None), u, None, None, sums=None),
        f"{size} heads forward": lambda: f.triton_rms_norm(heads, head_gain, EPS, rotary=rotary),
        f"{size} heads second": second(
            f._NormGradient, (heads, head_gain, heads_dy, head_scale, table), heads_u, None, None, sums=None
        ),
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
            "second": second(fused_gate._GateGradient, (a, b, dh), u, v, activation="silu"),
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
