"""The fused kernels of norm, gate, rotation, loss and step against their definitions, on poisoned memory.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.ops.clipped_sgd import clipped_sgd
from longread.ops.clipped_sgd.reference import reference_clipped_sgd
from longread.ops.cross_entropy import cross_entropy
from longread.ops.cross_entropy.reference import reference_cross_entropy
from longread.ops.rms_norm import shared_gain
from longread.ops.rms_norm.reference import reference_rms_norm
from longread.ops.rotary import frequencies, rotation
from longread.ops.rotary.reference import reference_rotate
from longread.ops.swiglu import Activation
from longread.ops.swiglu.reference import reference_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("interpreter", "poisoned_memory")


def kernels(op: str) -> ModuleType:
    return importlib.import_module(f"longread.ops.{op}.triton")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype).requires_grad_()


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def derivatives(f: Callable[..., Tensor], inputs: list[Tensor], inner: list[int] | None = None) -> list[Tensor]:
    """The value of f, its gradients for the inputs `inner` (or all), and those of a scalar made of all of these."""
    out = f(*inputs)
    chosen = [inputs[i] for i in (range(len(inputs)) if inner is None else inner)]
    weight = draw(*out.shape, seed=11)
    first = torch.autograd.grad((out.double() * weight).sum(), chosen, create_graph=True)
    mixed = (out.double() * draw(*out.shape, seed=12)).sum()
    mixed = mixed + sum((g.double() * draw(*g.shape, seed=13 + i)).sum() for i, g in enumerate(first))
    return [out, *first, *torch.autograd.grad(mixed, [*inputs, weight], allow_unused=True)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 2e-6) -> None:
    """Relative L2 error of each."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), i
        if a is not None:
            assert a.shape == e.shape
            error = (a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)
            assert error <= tolerance, f"result {i}: {error:.2e}"


def check(
    fused: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    tolerance: float = 2e-6,
    inner: list[int] | None = None,
) -> None:
    actual = derivatives(fused, inputs, inner)
    assert actual[0].dtype == inputs[0].dtype or actual[0].dtype == torch.float32
    agree(actual, derivatives(definition, wide(inputs), inner), tolerance)


@pytest.mark.parametrize("inner", [None, [0]], ids=["all", "x"])
@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 2), (2, 3, 64))), (7, 5), (3, 2600)],
    ids=str,
)
def test_rms_norm(shape: tuple[int, ...], inner: list[int] | None) -> None:
    norm = kernels("rms_norm").triton_rms_norm
    inputs = [draw(*shape), draw(shape[-1], seed=1)]
    check(
        lambda x, g: norm(x, g, 1e-5), lambda x, g: reference_rms_norm(x, g, 1e-5), inputs, tolerance=1e-5, inner=inner
    )


@pytest.mark.parametrize("shape", [(1, 5, 2, 8), (2, 3, 4, 10)], ids=str)
def test_rms_norm_of_heads_turned_and_added(shape: tuple[int, ...]) -> None:
    """Of the transposed view that attention makes, with a residual that lies otherwise in memory."""
    norm = kernels("rms_norm").triton_rms_norm
    _, T, _, H = shape
    rotary = rotation(7, T, frequencies(H, 1e4, device=DEVICE), draw(1))

    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(x: Tensor, gain: Tensor, residual: Tensor) -> Tensor:
            angles = rotary.to(torch.complex128) if x.dtype == torch.float64 else rotary
            return f(x.transpose(1, 2), gain, 1e-5, residual=residual, rotary=angles)

        return of

    inputs = [draw(*shape), draw(H, seed=1), draw(shape[0], shape[2], T, H, seed=2)]
    check(call(norm), call(reference_rms_norm), inputs)
    check(call(norm), call(reference_rms_norm), inputs, inner=[0])


def test_rms_norm_of_any_strides() -> None:
    """Five dimensions in an order that no three strides describe, and a column of a larger tensor."""
    norm = kernels("rms_norm").triton_rms_norm
    gain = draw(3, seed=1)
    for view in (lambda x: x.permute(2, 0, 3, 1, 4), lambda x: x.transpose(-1, -2)[..., :3], lambda x: x[:, :, 1]):
        check(
            lambda x, g, view=view: norm(view(x), g, 1e-5),
            lambda x, g, view=view: reference_rms_norm(view(x), g, 1e-5),
            [draw(2, 2, 3, 4, 3), gain],
        )


def sub_layer(x: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """x is normed and used beside the norm, by kernels but in float64."""
    if x.dtype == torch.float64:
        return reference_rms_norm(reference_rms_norm(x, before, 1e-5).sin(), after, 1e-5, residual=x)
    normed, beside = kernels("rms_norm").triton_rms_norm_and_input(x, before, 1e-5)
    return kernels("rms_norm").triton_rms_norm(normed.sin(), after, 1e-5, residual=beside)


@pytest.mark.parametrize("inner", [None, [0]], ids=["all", "x"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 70, 64)], ids=str)
def test_rms_norm_around_a_sub_layer(shape: tuple[int, ...], inner: list[int] | None) -> None:
    """Two of them; what comes back for x is the sum of both of its uses, at both orders."""

    def twice(x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return sub_layer(sub_layer(x, before, after), after, before)

    check(twice, twice, [draw(*shape), draw(shape[-1], seed=1), draw(shape[-1], seed=2)], 1e-5, inner)


@pytest.mark.parametrize("frozen", [False, True])
def test_norms_that_share_a_gain_sum_its_gradient_once(frozen: bool) -> None:
    """Of different numbers of rows, under an inner step; a sum that was taken is not taken again."""
    module, results = kernels("rms_norm"), []
    x, y, gain = draw(300, 5), draw(2, 3, 5, seed=1), draw(5, seed=2).requires_grad_(not frozen)
    for dtype, repeat in ((torch.float32, 2), (torch.float64, 1)):
        given = [z.detach().to(dtype).requires_grad_(z.requires_grad) for z in (x, y, gain)]
        wanted = given[:2] if frozen else given
        shared = given[2] if dtype == torch.float64 else shared_gain(given[2])
        norm = reference_rms_norm if dtype == torch.float64 else module.triton_rms_norm
        out = norm(given[0], shared, 1e-5).sin().sum() + norm(norm(given[1], shared, 1e-5), shared, 1e-5).cos().sum()
        (inner,) = torch.autograd.grad(out, given[:1], create_graph=True)
        total = out + inner.square().sum()
        found = [torch.autograd.grad(total, wanted, retain_graph=True) for _ in range(repeat)]
        results += [list(gradients) for gradients in found]
    for found in results[:-1]:
        agree(found, results[-1], 1e-5)


def test_the_gradient_of_a_shared_gain_cannot_be_recorded() -> None:
    gain = draw(5, seed=2)
    out = kernels("rms_norm").triton_rms_norm(draw(4, 5), shared_gain(gain), 1e-5).sin().sum()
    with pytest.raises(RuntimeError, match="taken once, at the end"):
        torch.autograd.grad(out, [gain], create_graph=True)


@pytest.mark.parametrize("halves", [False, True])
def test_the_second_derivative_of_a_gate_alone(halves: bool) -> None:
    """Nothing comes back for the gate itself then."""
    module, results = kernels("swiglu"), []
    for x in (draw(2, 3, 10), *wide([draw(2, 3, 10)])):
        if x.dtype == torch.float64:
            h = reference_swiglu(*x.chunk(2, -1))
        else:
            h = module.triton_swiglu_of_halves(x) if halves else module.triton_swiglu(*x.chunk(2, -1))
        (first,) = torch.autograd.grad(h, [x], draw(2, 3, 5, seed=4).detach().to(h), create_graph=True)
        results.append([first, *torch.autograd.grad((first * draw(2, 3, 10, seed=5).detach().to(h)).sum(), [x])])
    agree(*results)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_gate_of_which_one_input_is_constant(constant: int) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [draw(2, 3, 5, seed=i).detach().to(dtype).requires_grad_(i != constant) for i in range(2)]
        h = (kernels("swiglu").triton_swiglu if dtype == torch.float32 else reference_swiglu)(*inputs)
        (first,) = torch.autograd.grad(h.square().sum(), inputs[1 - constant], create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum() + h.sum(), inputs[1 - constant])])
    agree(*results)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 2049)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(activation: Activation, shape: tuple[int, ...]) -> None:
    gate = kernels("swiglu").triton_swiglu
    inputs = [(2 * draw(*shape)).detach().requires_grad_(), draw(*shape, seed=1)]
    check(lambda a, b: gate(a, b, activation), lambda a, b: reference_swiglu(a, b, activation), inputs)


def test_gelu_where_it_is_flat() -> None:
    """A cube of a large number is no reason for NaN."""
    gate = kernels("swiglu").triton_swiglu
    a = torch.tensor([-1e6, -90.0, 0.0, 90.0, 1e6], device=DEVICE)
    inputs = [a.requires_grad_(), draw(5)]
    check(lambda a, b: gate(a, b, "gelu_tanh"), lambda a, b: reference_swiglu(a, b, "gelu_tanh"), inputs)


def test_swiglu_of_the_halves_of_one_product() -> None:
    gate = kernels("swiglu").triton_swiglu
    check(lambda x: gate(*x.chunk(2, -1)), lambda x: reference_swiglu(*x.chunk(2, -1)), [draw(2, 3, 10)])
    check(lambda x: gate(x.mT, x.mT), lambda x: reference_swiglu(x.mT, x.mT), [draw(2, 3, 10)])


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 4098)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_of_halves(activation: Activation, shape: tuple[int, ...]) -> None:
    gate = kernels("swiglu").triton_swiglu_of_halves
    inputs = [(2 * draw(*shape)).detach().requires_grad_()]
    check(lambda x: gate(x, activation), lambda x: reference_swiglu(*x.chunk(2, -1), activation), inputs)


def test_rotate_at_any_order() -> None:
    rotate = kernels("rotary").triton_rotate
    x = draw(2, 5, 3, 12)
    rotary = rotation(10_000_000, 5, frequencies(12, 5e5, device=DEVICE), x)

    def cubed(f: Callable[..., Tensor], rotary: Tensor) -> Callable[..., Tensor]:
        return lambda x: f(x.transpose(1, 2), rotary) ** 3

    exact = rotary.to(torch.complex128)
    check(cubed(rotate, rotary), cubed(reference_rotate, exact), [x])
    rounded = rotate(x.bfloat16().transpose(1, 2), rotary)
    assert rounded.dtype == torch.bfloat16
    agree([rounded], [reference_rotate(x.bfloat16().double().transpose(1, 2), exact)], 0.004)


@pytest.fixture(params=["kept", "made again"])
def logits_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    limit = 1 << 30 if request.param == "kept" else 3 * 37 * 4
    monkeypatch.setattr(kernels("cross_entropy"), "LOGITS_BYTES", limit)
    return limit


@pytest.mark.usefixtures("logits_bytes")
@pytest.mark.parametrize("inner", [None, [0]], ids=["all", "hidden"])
def test_cross_entropy(inner: list[int] | None) -> None:
    nll = kernels("cross_entropy").triton_cross_entropy
    targets = torch.tensor([[0, 36, 3, 9], [4, 7, 8, 8]], device=DEVICE)
    inputs = [draw(2, 4, 5), draw(37, 5, seed=9)]
    check(
        lambda h, e: nll(h, e, targets), lambda h, e: reference_cross_entropy(h, e, targets), inputs, 1e-5, inner=inner
    )


@pytest.mark.usefixtures("logits_bytes")
def test_cross_entropy_differentiated_once() -> None:
    nll = kernels("cross_entropy").triton_cross_entropy
    targets = torch.tensor([0, 36, 3, 9, 9], device=DEVICE)
    inputs = [draw(5, 6), draw(37, 6, seed=9)]
    for wanted in ([0], [1], [0, 1]):
        results = []
        for f, given in ((nll, inputs), (reference_cross_entropy, wide(inputs))):
            out = f(*given, targets)
            results.append([out, *torch.autograd.grad((out * draw(5, seed=3)).sum(), [given[i] for i in wanted])])
        agree(*results)
    with torch.no_grad():
        agree([nll(*inputs, targets)], [reference_cross_entropy(*wide(inputs), targets)])
        assert nll(inputs[0][:0], inputs[1], targets[:0]).shape == (0,)


@pytest.mark.usefixtures("logits_bytes")
def test_cross_entropy_in_bfloat16() -> None:
    """As exact as products in bfloat16 allow, also where the target is improbable and all logits share a part."""
    nll = kernels("cross_entropy").triton_cross_entropy
    targets = torch.arange(16, device=DEVICE) * 2
    with torch.no_grad():
        shared = draw(1, 32, seed=5)
        inputs = [0.1 * draw(16, 32), 0.3 * draw(37, 32, seed=9) + shared]
    inputs = [x.bfloat16().requires_grad_() for x in inputs]
    check(lambda h, e: nll(h, e, targets), lambda h, e: reference_cross_entropy(h, e, targets), inputs, 0.02, inner=[0])


def test_cross_entropy_refuses_a_third_derivative() -> None:
    nll = kernels("cross_entropy").triton_cross_entropy
    h, head, targets = draw(3, 4), draw(6, 4, seed=1), torch.tensor([0, 1, 5], device=DEVICE)
    (first,) = torch.autograd.grad(nll(h, head, targets).sum(), [h], create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(first.square().sum(), [h], create_graph=True)


def step(f: Callable[..., Any], weights: list[Tensor], gradients: list[Tensor], **options: Any) -> list[Tensor]:
    new, norm = f(weights, gradients, **options)
    total = sum((w.double() * draw(*w.shape, seed=5 + i)).sum() for i, w in enumerate(new))
    return [*new, norm, *torch.autograd.grad(total, weights + gradients)]


@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipped_sgd(clip: float | None, dtype: torch.dtype) -> None:
    """One sequence below the threshold, two above; one matrix shared by all sequences; a gradient out of order."""
    fused = kernels("clipped_sgd").triton_clipped_sgd
    weights = [draw(4, 5).expand(3, 4, 5), draw(3, 2, seed=1), draw(3, 70, 61, seed=7)]
    with torch.no_grad():
        scale = torch.tensor([0.001, 1, 1], device=DEVICE)
        gradients = [draw(3, 5, 4, seed=2), draw(3, 2, seed=3), draw(3, 70, 61, seed=8)]
        gradients = [(g * scale.view(-1, *[1] * (g.dim() - 1))).to(dtype) for g in gradients]
        gradients[0] = gradients[0].transpose(1, 2)
    gradients = [g.requires_grad_() for g in gradients]
    expected = step(reference_clipped_sgd, wide(weights), wide(gradients), lr=0.7, clip=clip)
    for lr in (0.7, torch.tensor(0.7, device=DEVICE)):
        agree(step(fused, weights, gradients, lr=lr, clip=clip), expected, 1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("used", ["weights", "casts", "both", "one of each"])
def test_clipped_sgd_and_cast(clip: float | None, used: str) -> None:
    """The casts are those of the new weights, and what comes back for either of them counts."""
    weights = [draw(4, 5).expand(3, 4, 5), draw(3, 70, 61, seed=7)]
    gradients = [draw(3, 4, 5, seed=2, dtype=torch.bfloat16), draw(3, 70, 61, seed=8, dtype=torch.bfloat16)]

    def total(new: Sequence[Tensor], casts: Sequence[Tensor]) -> Tensor:
        chosen = {"weights": new, "casts": casts, "both": (*new, *casts), "one of each": (new[0], casts[1])}[used]
        return sum((w.double() * draw(*w.shape, seed=5 + i)).sum() for i, w in enumerate(chosen))

    fused = kernels("clipped_sgd").triton_clipped_sgd_and_cast
    new, casts, norm = fused(weights, gradients, torch.bfloat16, lr=0.7, clip=clip)
    assert all(torch.equal(cast, w.bfloat16()) for cast, w in zip(casts, new, strict=True))
    exact, exact_gradients = wide(weights), wide(gradients)
    expected, expected_norm = reference_clipped_sgd(exact, exact_gradients, lr=0.7, clip=clip)
    agree([*new, norm], [*expected, expected_norm], 1e-6)
    agree(
        [*torch.autograd.grad(total(new, casts), weights + gradients)],
        [*torch.autograd.grad(total(expected, expected), exact + exact_gradients)],
        0.01,
    )
    held = [g.detach() for g in gradients]  # a step that is held constant
    new, casts, _ = fused(weights, held, torch.bfloat16, lr=0.7, clip=clip)
    (found,) = torch.autograd.grad(total(new, casts), weights[1:])
    (wanted,) = torch.autograd.grad(total(exact, exact), exact[1:])
    agree([found], [wanted], 0.01)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipped_sgd_in_place(clip: float | None) -> None:
    fused = kernels("clipped_sgd").triton_clipped_sgd_
    weights, gradients = [draw(3, 4, 5).detach(), draw(3, 70, 61, seed=7).detach()], [draw(3, 5, 4), draw(3, 70, 61)]
    gradients = [g.detach().bfloat16() for g in gradients]
    gradients[0] = gradients[0].transpose(1, 2)
    expected, expected_norm = reference_clipped_sgd(wide(weights), wide(gradients), lr=0.7, clip=clip)
    working = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    norm = fused(weights, gradients, working, lr=0.7, clip=clip)
    agree([*weights, norm], [*expected, expected_norm], 1e-6)
    assert all(torch.equal(copy, w.bfloat16()) for copy, w in zip(working, weights, strict=True))


@pytest.mark.parametrize("clip", [None, 30.0])
def test_guarded_clipped_sgd(clip: float | None) -> None:
    """The first sequence steps, the second would step too far, the third has no gradient that is a number."""
    max_step_norm = torch.tensor(10.0, device=DEVICE)
    weights, gradients = [draw(4, 70, 61).detach(), draw(4, 2).detach()], [draw(4, 70, 61, seed=1), draw(4, 2, seed=2)]
    scale = torch.tensor([0.01, 1.0, math.nan, math.inf], device=DEVICE)
    gradients = [g.detach() * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
    expected, expected_norm = clipped_sgd(
        wide(weights), wide(gradients), lr=0.7, clip=clip, max_step_norm=max_step_norm
    )
    new, norm = kernels("clipped_sgd").triton_clipped_sgd(
        weights, gradients, lr=0.7, clip=clip, max_step_norm=max_step_norm
    )
    agree([*new, norm[:2]], [*expected, expected_norm[:2]], 1e-6)
    assert not norm[2:].isfinite().any()
    working = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    kernels("clipped_sgd").triton_clipped_sgd_(
        weights, gradients, working, lr=0.7, clip=clip, max_step_norm=max_step_norm
    )
    assert all(torch.equal(w, x) for w, x in zip(weights, new, strict=True))
    assert all(torch.equal(copy, w.bfloat16()) for copy, w in zip(working, weights, strict=True))


@pytest.mark.parametrize("clip", [None, 0.5, 90.0])
def test_clipped_sgd_with_norms_over_ranks(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with equal parts, of which one runs: a sum over ranks is twice its own."""
    module, group = kernels("clipped_sgd"), object()
    monkeypatch.setattr(module, "summed", lambda x, over: x.mul_(2) if over is group else x)
    weights, gradients = [draw(3, 70, 61), draw(3, 2)], [draw(3, 70, 61, seed=8), draw(3, 2, seed=3)]
    found = step(module.triton_clipped_sgd, weights, gradients, lr=0.7, clip=clip, group=group)
    twice = [wide(weights + weights), wide(gradients + gradients)]

    new, norm = reference_clipped_sgd(*twice, lr=0.7, clip=clip)
    total = sum((w.double() * draw(*w.shape, seed=5 + i % 2)).sum() for i, w in enumerate(new))
    expected = torch.autograd.grad(total, twice[0][:2] + twice[1][:2])
    agree(found, [*new[:2], norm, *expected], 1e-6)


def test_clipped_sgd_is_finite_at_zero() -> None:
    weight, gradient = draw(2, 3), torch.zeros(2, 3, device=DEVICE, requires_grad=True)
    new, norm, _, adjoint = step(kernels("clipped_sgd").triton_clipped_sgd, [weight], [gradient], lr=1.0, clip=1.0)
    assert torch.equal(new, weight)
    assert norm.tolist() == [0.0, 0.0]
    assert torch.equal(adjoint, -draw(2, 3, seed=5))


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "rotary", "cross_entropy", "clipped_sgd"])
def test_dispatch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels can answer they are asked, and elsewhere not."""
    unit, fused = importlib.import_module(f"longread.ops.{op}"), kernels(op)
    name = "rotate" if op == "rotary" else op
    monkeypatch.setattr(fused, f"triton_{name}", lambda *args, **kwargs: "fused")
    x = torch.ones(2, 4)
    arguments: dict[str, tuple] = {
        "rms_norm": (x, x[0], 1e-5),
        "swiglu": (x, x),
        "rotary": (x, rotation(0, 2, frequencies(4, 1e4), x)),
        "cross_entropy": (x, x, torch.zeros(2, dtype=torch.long)),
        "clipped_sgd": ([x], [x]),
    }
    options = {"lr": 1.0, "clip": None} if op == "clipped_sgd" else {}
    assert getattr(unit, name)(*arguments[op], **options) != "fused"
    monkeypatch.setattr(unit, "fusible", lambda *tensors: True)
    assert getattr(unit, name)(*arguments[op], **options) == "fused"
    if op == "cross_entropy":
        assert getattr(unit, name)(*arguments[op], soft_cap=3.0) != "fused"


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [None, [0]], ids=["all", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_soft_capped_cross_entropy_has_no_kernel_but_answers(dtype: torch.dtype, inner: list[int] | None) -> None:
    targets = torch.randint(20_001, (301,), device=DEVICE)
    with torch.no_grad():
        inputs = [draw(301, 64, dtype=dtype), (0.5 * draw(20_001, 64, seed=9)).to(dtype)]
    check(
        lambda h, e: cross_entropy(h, e, targets, 5.0),
        lambda h, e: reference_cross_entropy(h, e, targets, 5.0),
        [x.requires_grad_() for x in inputs],
        1e-4 if dtype == torch.float32 else 0.03,
        inner=inner,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1536, 16), (2560, 32)])
def test_on_the_shapes_of_the_paper(width: int, heads: int, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    norm, nll = kernels("rms_norm").triton_rms_norm, kernels("cross_entropy").triton_cross_entropy
    x, gain = draw(2, 501, width, dtype=dtype), draw(width, seed=1)
    check(lambda x, g: norm(x, g, 1e-6), lambda x, g: reference_rms_norm(x, g, 1e-6), [x, gain], tolerance)
    check(sub_layer, sub_layer, [x, gain, draw(width, seed=2)], tolerance, inner=[0])
    check(kernels("swiglu").triton_swiglu, reference_swiglu, [x, draw(*x.shape, seed=2, dtype=dtype)], tolerance)
    check(kernels("swiglu").triton_swiglu_of_halves, lambda x: reference_swiglu(*x.chunk(2, -1)), [x], tolerance)
    check(
        lambda a, b: kernels("swiglu").triton_swiglu(a, b, "gelu_tanh"),
        lambda a, b: reference_swiglu(a, b, "gelu_tanh"),
        [x, draw(*x.shape, seed=2, dtype=dtype)],
        tolerance,
    )
    H = width // heads
    rotary = rotation(10**6, 501, frequencies(H, 5e5, device=DEVICE), draw(1))

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, H)).transpose(1, 2)

    check(
        lambda x, g: norm(split(x), g, 1e-6, rotary=rotary),
        lambda x, g: reference_rms_norm(split(x), g, 1e-6, rotary=rotary.to(torch.complex128)),
        [x, draw(H, seed=3)],
        tolerance,
        inner=[0],
    )
    targets = torch.randint(50_001, (2, 501), device=DEVICE)
    with torch.no_grad():
        head = (draw(50_001, width, seed=4) * width**-0.5).to(dtype)
    check(
        lambda h, e: nll(h, e, targets),
        lambda h, e: reference_cross_entropy(h, e, targets),
        [x, head.requires_grad_()],
        tolerance,
        inner=[0],
    )
