"""Products of one vector a sequence with what stands around them, against float64; and the kernels of decoding.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.attention.ring import ring_attention
from longread.ops.gemv import Stream, entered, gemv
from longread.ops.rms_norm import Gain
from longread.ops.rotary import frequencies, rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 0.1


@pytest.fixture
def kernels(interpreter: None, poisoned_memory: None) -> Any:
    return importlib.import_module("longread.ops.gemv.triton")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(x: Any) -> Any:
    """The same in float64."""
    if isinstance(x, Tensor):
        return x.double()
    if isinstance(x, tuple):
        parts = [exact(y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return [exact(y) for y in x] if isinstance(x, list) else x


def by_hand(
    stream: Stream,
    weights: list[Tensor],
    *,
    gain: Gain | None = None,
    biases: list[Tensor] | None = None,
    gate: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    def normed(x: Tensor, norm: Gain | None) -> Tensor:
        return x if norm is None else norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    x = stream.x if stream.added is None else stream.x + normed(stream.added, stream.gain)
    y = normed(x, gain)
    out = [torch.stack([y[b] @ (w[b] if w.dim() == 3 else w).T for b in range(len(y))]) for w in weights]
    if biases is not None:
        out = [one + bias for one, bias in zip(out, biases, strict=True)]
    if gate is not None:
        out = [(F.silu(out[0]) if gate == "silu" else F.gelu(out[0], approximate="tanh")) * out[1]]
    return x, out


def agree(found: tuple[Tensor, Any], expected: tuple[Tensor, Any], tolerance: float = 2e-6) -> None:
    for a, e in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= tolerance * e.norm()


CASES: dict[str, tuple[int, int, list[int], dict[str, Any]]] = {
    # B, D, O of each matrix, options
    "norms, three matrices": (1, 20, [12, 4, 7], {"added": True, "after": True, "before": True}),
    "biases": (1, 20, [12, 5], {"added": True, "before": True, "biases": True}),
    "gate, a set a sequence": (3, 24, [37, 37], {"added": True, "after": True, "gate": "silu", "own": True}),
    "GELU and biases": (1, 6, [33, 33], {"before": True, "gate": "gelu_tanh", "biases": True}),
    "a product": (1, 40, [70], {}),
    "several vectors": (3, 20, [12, 4, 7], {"added": True, "after": True, "before": True, "biases": True}),
}


def given(case: str) -> tuple[Stream, list[Tensor], dict[str, Any]]:
    B, D, sizes, options = CASES[case]
    has = options.get
    gains = [Gain(1 + 0.3 * draw(D, seed=seed), EPS * seed) for seed in (1, 2)]
    added = draw(B, D, seed=3) if has("added") else None
    stream = Stream(draw(B, D), added, gains[0] if has("after") else None)
    leading = (B,) if has("own") else ()
    weights = [draw(*leading, size, D, seed=4 + i) for i, size in enumerate(sizes)]
    biases = [draw(size, seed=8 + i) for i, size in enumerate(sizes)] if has("biases") else None
    return stream, weights, {"gain": gains[1] if has("before") else None, "biases": biases, "gate": has("gate")}


@pytest.mark.parametrize("case", CASES)
def test_the_definition(case: str) -> None:
    stream, weights, options = exact(given(case)[0]), exact(given(case)[1]), given(case)[2]
    options = {name: exact(value) for name, value in options.items()}
    agree(entered(stream, weights, **options), by_hand(stream, weights, **options), 1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case != "several vectors"])
@pytest.mark.parametrize(("programs", "large"), [(1, 10**9), (512, 10**9), (1, 1), (512, 1)])
def test_the_kernel(case: str, programs: int, large: int, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs of many rows, with many, and with few that go on to other rows."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "LARGE", large)
    for name in ("ELEMENTS", "ELEMENTS_AT_A_TIME"):
        monkeypatch.setattr(kernels, name, 512)
    stream, weights, options = given(case)
    expected = by_hand(exact(stream), exact(weights), **{name: exact(value) for name, value in options.items()})
    agree(kernels.triton_entered(stream, weights, **options), expected)


def test_a_product_in_another_type(kernels: Any) -> None:
    """Of bfloat16, with a sum in float32 that is not rounded; and of a part of a larger tensor."""
    x, weight = draw(2, 100).bfloat16(), draw(2, 10, 100, seed=1).bfloat16()
    expected = torch.einsum("bd,bod->bo", x.double(), weight.double())
    out = kernels.triton_gemv(x, weight, dtype=torch.float32)
    assert out.dtype == torch.float32
    agree((out, ()), (expected, ()))
    agree((kernels.triton_gemv(x.repeat(1, 2)[:, :100], weight), ()), (expected, ()), 4e-3)


@pytest.mark.parametrize(
    ("x", "weight", "answers"),
    [
        ((1, 8), (3, 8), True),
        ((2, 8), (3, 8), False),  # tensor cores are faster
        ((2, 8), (2, 3, 8), True),
        ((1, 16_385), (1, 16_385), False),
        ((0, 8), (3, 8), False),
    ],
    ids=str,
)
def test_which_answers(
    x: tuple[int, ...], weight: tuple[int, ...], answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = importlib.import_module("longread.ops.gemv")
    fused = importlib.import_module("longread.ops.gemv.triton")
    assert gemv(torch.ones(x), torch.ones(weight)).shape == (x[0], weight[-2])
    monkeypatch.setattr(op, "fusible", lambda *tensors: True)
    monkeypatch.setattr(fused, "triton_gemv", lambda *args, **options: "kernel")
    monkeypatch.setattr(fused, "triton_entered", lambda *args, **options: "kernel")
    of_strides = torch.ones(*weight[:-1], weight[-1] + 1)[..., 1:]
    for found, where in (
        (gemv(torch.ones(x), torch.ones(weight)), answers),
        (entered(Stream(torch.ones(x)), [torch.ones(weight)]), answers),
        (gemv(torch.ones(x), of_strides), False),
    ):
        assert (isinstance(found, str) and found == "kernel") == where


@pytest.mark.parametrize(("G", "H"), [(2, 10), (4, 48)], ids=["heads share a ring", "a head by pieces"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_a_ring_takes_up_what_is_normed_and_turned(
    G: int,
    H: int,
    normed: bool,
    turned: bool,
    interpreter: None,
    poisoned_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several programs a head, whose counts of arrival are zeros again for the next call."""
    module = importlib.import_module("longread.ops.attention.ring_triton")
    monkeypatch.setattr(module, "SHARE", 16)
    monkeypatch.setattr(module, "SMALLEST_SHARE", 16)
    B, N, R = 2, 4, 45
    position = torch.tensor([3, 2 * R + 7], device=DEVICE)
    query, key, value = draw(B, N, 1, H), draw(B, G, 1, H, seed=1), draw(B, G, 1, H, seed=2)
    ring = [draw(B, G, R, H, seed=3), draw(B, G, R, H, seed=4)]
    options = {
        "norms": (Gain(1 + draw(H, seed=5), 0.1), Gain(1 + draw(H, seed=6), 0.2)) if normed else None,
        "rotary": rotation(position, 1, frequencies(H, 1e4, device=DEVICE), query) if turned else None,
    }
    wide: dict[str, Any] = {"norms": exact(options["norms"])}
    wide["rotary"] = rotation(position, 1, frequencies(H, 1e4, device=DEVICE), query.double()) if turned else None
    expected_ring = [x.double() for x in ring]
    arrivals = torch.zeros(B * N, dtype=torch.int32, device=DEVICE)
    for step in range(2):
        new = [(1 + step) * x for x in (query, key, value)]
        expected = ring_attention(
            *(x.double() for x in new), (expected_ring[0], expected_ring[1]), position + step, window=40, **wide
        )
        found = module.triton_ring_attention(
            *new, (ring[0], ring[1]), position + step, window=40, arrivals=arrivals, **options
        )
        agree((found, ring), (expected, expected_ring), 1e-6)
        assert not arrivals.any()


@pytest.mark.parametrize(
    ("R", "N", "heads", "pieces", "share"),
    [
        (8192, 32, 1, True, 256),
        (8192, 12, 1, True, 128),  # 384 programs would be too few
        (1024, 12, 1, True, 64),  # so are 192, but shares are no smaller
        (1024, 12, 1, False, 256),
        (8192, 32, 4, False, 64),
        (9, 9, 3, False, 80),
        (1_000_000, 32, 1, True, 3920),  # 256 shares
    ],
)
def test_a_ring_is_split_among_enough_programs(R: int, N: int, heads: int, pieces: bool, share: int) -> None:
    module = importlib.import_module("longread.ops.attention.ring_triton")
    assert module.share_of(R, N, heads, pieces=pieces) == share


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longread.ops.attention import ring_triton
from longread.ops.gemv import triton as gemv_triton

FLOATS = ("eps", "scale", "query_eps", "key_eps")
INTEGERS = ("size", "batch", "share", "window", "R", "query_", "key_", "value_", "tiles")
POINTERS = ("query_gain", "key_gain")
TYPES = {"positions": "*i64", "arrivals": "*i32", "mixed": "*fp32", "statistics": "*fp32", "angles": "*fp32"}


def compiled(kernel, warps, **fixed):
    parameters, signature, attributes = list(inspect.signature(kernel.fn).parameters), {}, {}
    for i, name in enumerate(parameters):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.startswith("eps") or name in FLOATS:
            signature[name] = "fp32"
        elif name.startswith(INTEGERS) and name not in POINTERS:
            signature[name] = "i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = TYPES.get(name, "*bf16")
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


flags = dict(MATRICES=3, ADD=True, NORM_ADDED=True, NORM=True, BIAS=False, GATE=False, GELU=False)
for rows, warps, stages in ((4, 8, 0), (2, 4, 3)):
    ptx = compiled(gemv_triton._gemv, warps, D=2560, WIDTH=4096, ROWS=rows, STAGES=stages, **flags)
    # the first rows are asked for 16 bytes a thread, others while those before are on their way
    assert "evict_first.L2::cache_hint.v4.b32" in ptx and ("cp.async" in ptx) == (stages > 0)
flags = dict(HEADS=1, PARTS=1, NORM=True, TURN=True, BLOCK=16, TOGETHER=32)
for H, piece, unroll, warps, stages in ((80, 16, 2, 1, 1), (128, 128, 1, 2, 3)):
    ptx = compiled(ring_triton._ring_kernel, warps, H=H, WIDTH=128, PIECE=piece, UNROLL=unroll, STAGES=stages, **flags)
    assert "atom.global.gpu.acq_rel.add" in ptx and ("cp.async" in ptx) == (stages > 1)
    assert ("evict_first.L2::cache_hint.v4.b32" in ptx) == (stages == 1)  # 16 bytes a thread
"""


def test_kernels_of_decoding_compile_for_hopper_without_a_gpu() -> None:
    root = Path(__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
