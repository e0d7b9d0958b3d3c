"""Whether norm, gate, rotation, loss and inner step are right on a GPU: the gate of `benchmarks.gpu_pointwise`.

Values, gradients and gradients of gradients against float64, on memory in which what is not written is not a number.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from longread.ops.clipped_sgd import triton as fused_sgd
from longread.ops.clipped_sgd.reference import reference_clipped_sgd
from longread.ops.cross_entropy import chunked, triton as fused_nll
from longread.ops.cross_entropy.reference import reference_cross_entropy
from longread.ops.rms_norm import explicit as explicit_norm, triton as fused_norm
from longread.ops.rms_norm.reference import reference_rms_norm
from longread.ops.rotary import frequencies, rotation, triton as fused_rotary
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
    single = rotation(10**6, T, frequencies(H, 5e5, device="cuda"), torch.empty(0, device="cuda"))
    norms = fused_norm.triton_rms_norm, reference_rms_norm, explicit_norm.explicit_rms_norm

    def rotary(x: Tensor) -> Tensor:
        return single.to(torch.complex128) if x.dtype == torch.float64 else single

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (N, H)).transpose(1, 2)

    def check(name: str, of: Callable[[Any], Callable[..., Tensor]], triple: Any, inputs: list[Tensor]) -> None:
        ours, definition, peer = triple
        inner = list(range(len(inputs))) if name in ("rms_norm", "swiglu") else [0]
        attempt(name, lambda: compare(f"{name} {label}", of(ours), of(definition), inputs, inner, of(peer)))

    check("rms_norm", lambda f: lambda x, g: f(x, g, EPS), norms, [x, gain])
    check("rms_norm + residual", lambda f: lambda x, g, r: f(x, g, EPS, residual=r), norms, [x, gain, y])
    check("norm and turn", lambda f: lambda x, g: f(split(x), g, EPS, rotary=rotary(x)), norms, [x, head_gain])
    rotations = fused_rotary.triton_rotate, reference_rotate, reference_rotate
    check("rotate", lambda f: lambda x: f(split(x), rotary(x)) ** 3, rotations, [x])
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
