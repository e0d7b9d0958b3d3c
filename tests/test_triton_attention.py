"""The attention kernels against their definition, at every order, on poisoned memory.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_attention
from longread.ops.attention import FEWEST_ROWS, KEPT_OPERATIONS, attention
from longread.ops.attention.reference import reference_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("interpreter", "poisoned_memory")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("longread.ops.attention.triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "FLOAT32", module.Blocks(32, 32, 4, 2))  # an interpreter likes larger tiles
    return module


def draw(B: int, N: int, T: int, P: int, H: int, G: int | None = None) -> list[Tensor]:
    """query, key, value, past key, past value in float64; of G heads but for the query's N."""
    generator = torch.Generator().manual_seed(T + P)
    sizes = [(heads or N, length) for heads, length in ((N, T), (G, T), (G, T), (G, P), (G, P))]
    return [torch.randn(B, *size, H, generator=generator, dtype=torch.float64) for size in sizes]


def repeated(
    q: Tensor, k: Tensor, v: Tensor, *, past: tuple[Tensor, Tensor] | None = None, window: int | None
) -> Tensor:
    """Keys and values written out for every head that shares them."""

    def for_each(x: Tensor) -> Tensor:
        return torch.stack([x[:, n * x.shape[1] // q.shape[1]] for n in range(q.shape[1])], 1)

    older = None if past is None else (for_each(past[0]), for_each(past[1]))
    return reference_attention(q, for_each(k), for_each(v), past=older, window=window)


def derivatives(
    f: Callable[..., Tensor],
    tensors: list[Tensor],
    dtype: torch.dtype,
    window: int | None,
    inner: slice,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:
    """Output, gradients of the inputs in `inner`, and gradients of a scalar made of these and the output."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in tensors]
    q, k, v, *past = (layout(x) for x in leaves)
    generator = torch.Generator().manual_seed(1)

    def weighed(x: Tensor) -> Tensor:
        return (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()

    out = f(q, k, v, past=(past[0], past[1]) if past else None, window=window)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out).requires_grad_()
    first = torch.autograd.grad(out, leaves[inner], cotangent, create_graph=True)
    second = torch.autograd.grad(sum(weighed(x) for x in (*first, out)), [*leaves, cotangent], allow_unused=True)
    return [torch.zeros(()) if x is None else x.detach().double().cpu() for x in (out, *first, *second)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():
            error = (a - e).norm() / e.norm().clamp(min=1.0)
            assert error < tolerance, f"result {index}: {error:.1e}"


CASES = [
    # B, N, T, P, H, window
    (1, 2, 64, 100, 80, None),
    pytest.param((1, 1, 45, 131, 48, 128), marks=pytest.mark.slow),
    (2, 1, 100, 37, 20, 33),
    pytest.param((1, 1, 96, 64, 32, 96), marks=pytest.mark.slow),
    pytest.param((1, 2, 37, 5, 96, 7), marks=pytest.mark.slow),
    (1, 1, 33, 40, 6, 1),
    (1, 3, 1, 45, 16, 32),
]
# the other tests leave the past constant too
INNER = [pytest.param(slice(3), id="past constant", marks=pytest.mark.slow), pytest.param(slice(5), id="all")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_every_order_is_the_reference(kernels: ModuleType, case: tuple[Any, ...], inner: slice) -> None:
    *sizes, window = case
    tensors = draw(*sizes)
    agree(
        derivatives(kernels.triton_attention, tensors, torch.float32, window, inner),
        derivatives(reference_attention, tensors, torch.float64, window, inner),
        2e-5,
    )


SHARED = [
    # B, N, T, P, H, G, window
    (1, 4, 40, 41, 16, 2, None),
    pytest.param((1, 3, 33, 40, 20, 1, 20), marks=pytest.mark.slow),
    (1, 3, 1, 45, 6, 1, 32),
]


@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_heads_share_keys_and_values_at_every_order(kernels: ModuleType, case: tuple[Any, ...], inner: slice) -> None:
    *sizes, window = case
    tensors = draw(*sizes)
    agree(
        derivatives(kernels.triton_attention, tensors, torch.float32, window, inner),
        derivatives(repeated, tensors, torch.float64, window, inner),
        2e-5,
    )


@pytest.mark.parametrize(
    ("blocks", "window"), [((64, 16), 20), pytest.param((16, 32), None, marks=pytest.mark.slow)], ids=str
)
def test_heads_share_in_any_blocks(
    kernels: ModuleType, blocks: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FLOAT32", kernels.Blocks(*blocks, 4, 2))
    tensors = draw(1, 2, 70, 40, 16, 1)
    agree(
        derivatives(kernels.triton_attention, tensors, torch.float32, window, slice(3)),
        derivatives(repeated, tensors, torch.float64, window, slice(3)),
        2e-5,
    )


def test_shared_heads_are_never_written_out(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are given, and write, one head of keys and values for each group."""
    given = []
    launch = kernels._Problem.launch

    def recorded(self: Any, kernel: Any, by_query: Any, by_key: Any, *arguments: Any, **constants: Any) -> None:
        given.extend(x.shape[1] for x in by_key if x is not None)
        launch(self, kernel, by_query, by_key, *arguments, **constants)

    monkeypatch.setattr(kernels._Problem, "launch", recorded)
    derivatives(kernels.triton_attention, draw(1, 4, 20, 30, 16, 2), torch.float32, 40, slice(5))
    assert set(given) == {2}
    assert len(given) > 20


def test_without_a_past(kernels: ModuleType) -> None:
    tensors = draw(2, 2, 45, 0, 16)[:3]
    for window in (None, 40):
        agree(
            derivatives(kernels.triton_attention, tensors, torch.float32, window, slice(3)),
            derivatives(reference_attention, tensors, torch.float64, window, slice(3)),
            2e-5,
        )


def test_its_result_can_be_kept_by_a_block_that_runs_again(kernels: ModuleType) -> None:
    inputs = [x.to(DEVICE, torch.float32).requires_grad_() for x in draw(1, 2, 45, 0, 16)[:3]]
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(operation.name())
            return operation(*args, **(kwargs or {}))

    with Seen():
        kernels.triton_attention(*inputs, window=20)
    assert len(KEPT_OPERATIONS.intersection(seen)) == 1


@pytest.mark.parametrize("size", [1.0, 9.0], ids=["scores with a bound", "scores too large for it"])
@pytest.mark.parametrize("H", [pytest.param(16, marks=pytest.mark.slow), 20])
def test_gains_change_nothing(kernels: ModuleType, H: int, size: float) -> None:
    tensors = draw(1, 2, 45, 61, H)
    gains = [size * torch.rand(H, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    for i in (0, 1, 3):  # queries, keys, past keys
        tensors[i] = torch.nn.functional.rms_norm(tensors[i], (H,)) * gains[min(i, 1)]
    known = tuple(gain.to(DEVICE, torch.float32) for gain in gains)

    def bounded(*args: Tensor, **options: Any) -> Tensor:
        return kernels.triton_attention(*args, **options, gains=known)

    bound = H**0.5 * math.log2(math.e) * float(gains[0].max() * gains[1].max())
    assert (bound < kernels.LARGEST_BOUND) == (size == 1.0)
    for window in (None, 50):
        agree(
            derivatives(bounded, tensors, torch.float32, window, slice(3)),
            derivatives(reference_attention, tensors, torch.float64, window, slice(3)),
            2e-5 * size**2,
        )


@pytest.mark.parametrize("P", [0, 9])
def test_what_is_timed_are_the_kernels_with_all_they_take(
    kernels: ModuleType, P: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "draw", lambda case: [x.to(DEVICE, torch.float32) for x in draw(*case[1:6])])
    case = gpu_attention.Case("", 1, 1, 20, P, 8, 16)
    timed = gpu_attention.launches(case)
    for name in gpu_attention.CANDIDATES:
        assert any(one.startswith(name) for one in timed)
        gpu_attention.make_launches_of(case, name)


def test_float16_does_without_the_bound(kernels: ModuleType) -> None:
    """Far below it, as most scores are, exp2 is zero in float16."""
    H, gain = 20, torch.full((20,), 2.5)
    tensors = [torch.nn.functional.rms_norm(x, (H,)) for x in draw(1, 1, 40, 30, H)]
    q, k, v, *past = (x.to(DEVICE, torch.float16) for x in (gain * x if i != 2 else x for i, x in enumerate(tensors)))
    found = kernels.triton_attention(q, k, v, past=(past[0], past[1]), window=None, gains=(gain.to(DEVICE),) * 2)
    wide = [x.double() for x in (q, k, v, *past)]
    exact = reference_attention(*wide[:3], past=(wide[3], wide[4]), window=None)
    agree([found.double()], [exact], 2e-3)


@pytest.mark.parametrize(
    ("blocks", "window"),
    [
        ((64, 16), 20),
        ((16, 32), None),
        ((32, 64), 150),
        *(
            pytest.param(blocks, window, marks=pytest.mark.slow)
            for blocks, others in (((64, 16), (None, 150)), ((16, 32), (20, 150)), ((32, 64), (None, 20)))
            for window in others
        ),
    ],
    ids=str,
)
def test_any_blocks(
    kernels: ModuleType, blocks: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FLOAT32", kernels.Blocks(*blocks, 4, 2))
    tensors = draw(1, 1, 81, 95, 16)
    agree(
        derivatives(kernels.triton_attention, tensors, torch.float32, window, slice(3)),
        derivatives(reference_attention, tensors, torch.float64, window, slice(3)),
        2e-5,
    )


def test_half_precision_is_as_good_as_the_reference(kernels: ModuleType) -> None:
    """float16, since the interpreter cannot multiply bfloat16."""
    tensors = [x.to(torch.float16).double() for x in draw(1, 1, 140, 150, 80)]
    exact = derivatives(reference_attention, tensors, torch.float64, 200, slice(3))
    plain = derivatives(reference_attention, tensors, torch.float16, 200, slice(3))
    fused = derivatives(kernels.triton_attention, tensors, torch.float16, 200, slice(3))
    for f, p, e in zip(fused, plain, exact, strict=True):
        assert (f - e).norm() <= 1.5 * (p - e).norm() + 1e-3 * e.norm()


def test_views_are_read_where_they_lie(kernels: ModuleType) -> None:
    """Heads inside [B, T, N, H], and the newest part of a longer past."""

    def layout(x: Tensor) -> Tensor:
        x = torch.cat((torch.full_like(x[:, :, :9], math.nan), x), dim=2)
        return x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 9:]

    tensors = draw(2, 3, 40, 50, 32)
    agree(
        derivatives(kernels.triton_attention, tensors, torch.float32, 60, slice(3), layout),
        derivatives(reference_attention, tensors, torch.float64, 60, slice(3)),
        2e-5,
    )
    q, k, v = (layout(x.to(DEVICE, torch.float32)) for x in tensors[:3])
    out = kernels.triton_attention(q, k, v, window=None)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4])
def test_one_gradient_alone(kernels: ModuleType, wanted: int) -> None:
    """Of one input, and through it of all: cotangents that nobody made count as zero."""
    tensors = draw(1, 1, 40, 41, 16)
    alone = slice(wanted, wanted + 1)
    agree(
        derivatives(kernels.triton_attention, tensors, torch.float32, 50, alone),
        derivatives(reference_attention, tensors, torch.float64, 50, alone),
        2e-5,
    )


def test_the_inner_gradient_leaves_the_past_alone(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = kernels._Problem.launch

    def recorded(self: Any, kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append((kernel.__name__, arguments[3] if len(arguments) > 3 else None))
        launch(self, kernel, *arguments, **constants)

    monkeypatch.setattr(kernels._Problem, "launch", recorded)
    q, k, v, *past = (x.to(DEVICE, torch.float32).requires_grad_() for x in draw(1, 1, 20, 30, 16))
    out = kernels.triton_attention(q, k, v, past=tuple(past), window=40)
    assert launched == [("_forward_kernel", None)]
    torch.autograd.grad(out.sum(), [q, k, v], create_graph=True)
    assert launched[1:] == [("_query_gradient_kernel", None), ("_key_gradient_kernel", False)]
    out.sum().backward()
    assert launched[3:] == [
        ("_query_gradient_kernel", None),
        ("_key_gradient_kernel", False),
        ("_key_gradient_kernel", True),
    ]


def test_the_second_order_keeps_memory_linear(kernels: ModuleType) -> None:
    """Nothing that autograd saves is larger than an input."""
    largest = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    q, k, v, *past = (x.to(DEVICE, torch.float32).requires_grad_() for x in draw(1, 1, 64, 64, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = kernels.triton_attention(q, k, v, past=tuple(past), window=None)
        torch.autograd.grad(out.sum(), [q, k, v], create_graph=True)
    assert 0 < largest <= q.numel()


@pytest.mark.gpu
def test_dispatch_takes_the_kernels_on_a_gpu() -> None:
    q, k, v, *past = (x.to("cuda", torch.bfloat16).requires_grad_() for x in draw(1, 2, 256, 256, 64))
    for given in (None, tuple(past)):
        fused = attention(q, k, v, past=given, window=300, order=2)
        assert type(fused.grad_fn).__name__ == "_AttentionBackward"
    assert type(attention(q, k, v, window=100, order=1).grad_fn).__name__ == "_AttentionBackward"
    assert type(attention(q, k, v, window=256, order=1).grad_fn).__name__ == "_AttentionBackward"
    for shape in ((1, 1, FEWEST_ROWS, 64), (8, 2, FEWEST_ROWS // 16, 64)):
        many = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        assert "ScaledDotProduct" in type(attention(*many, window=None, order=1).grad_fn).__name__


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("window", [None, 500, 1500])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
def test_low_precision_on_a_gpu(kernels: ModuleType, heads: tuple[int, int], head_dim: int, window: int | None) -> None:
    N, G = heads
    tensors = [x.to(torch.bfloat16).double() for x in draw(1, N, 700, 1025, head_dim, G)]
    exact = derivatives(repeated, tensors, torch.float64, window, slice(3))
    plain = derivatives(repeated, tensors, torch.bfloat16, window, slice(3))
    fused = derivatives(kernels.triton_attention, tensors, torch.bfloat16, window, slice(3))
    for f, p, e in zip(fused, plain, exact, strict=True):
        assert (f - e).norm() <= 1.5 * (p - e).norm() + 1e-3 * e.norm()


@pytest.mark.gpu
def test_shared_heads_give_the_same_bits_every_time(kernels: ModuleType) -> None:
    tensors = draw(2, 8, 300, 513, 64, 2)
    first, second = (derivatives(kernels.triton_attention, tensors, torch.bfloat16, 400, slice(5)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


COMPILE = """
import inspect
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longread.ops.attention import triton as kernels

BY_QUERY = {"q", "a", "o", "do", "od", "dq", "qh"}
every = [(name, 1) for name in kernels.TABLE] + [("key_gradient", 3), ("key_second", 3)]
for name, group in every[:: int(sys.argv[1])]:
    function = getattr(kernels, f"_{name}_kernel")
    blocks = kernels.blocks_of(name, 80, 2)
    signature, fixed = {}, {}
    for parameter in inspect.signature(function.fn).parameters:
        if parameter.isupper() and len(parameter) > 1:
            numbers = {"QUERIES": blocks.queries, "KEYS": blocks.keys, "GROUP": group, "CLIPPED": False}
            fixed[parameter] = numbers.get(parameter, True)
        elif parameter == "H":
            fixed[parameter] = 80
        elif parameter.endswith("gain"):
            signature[parameter] = "*fp32"
        elif parameter in ("T", "P", "window"):
            signature[parameter] = "i32"
        elif parameter == "scale":
            signature[parameter] = "fp32"
        elif parameter in ("lse", "delta", "r", "phi"):
            signature[parameter] = f"tensordesc<fp32[1, 1, {blocks.queries}]>" if name.startswith("key") else "*fp32"
        elif parameter[:2] in ("pb", "pc"):
            fixed[parameter] = None
        else:
            rows = blocks.queries if parameter[:-1] in BY_QUERY else blocks.keys
            signature[parameter] = f"tensordesc<bf16[1, 1, {rows}, {64 if parameter[-1] == '0' else 16}]>"
    order = list(inspect.signature(function.fn).parameters)
    signature = {p: signature.get(p, "constexpr") for p in order}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed)
    options = dict(num_warps=blocks.warps, num_stages=blocks.stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"] and "cp.async.bulk.tensor.4d" in compiled.asm["ptx"], name
    assert compiled.metadata.shared < 227 * 1024, name
    print(name)
"""


@pytest.mark.parametrize(("step", "count"), [(7, 2), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_kernels_compile_for_hopper_without_a_gpu(step: int, count: int) -> None:
    """The first and the last, or all."""
    root = Path(__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(step)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == count
