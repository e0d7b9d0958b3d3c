"""Every op against its definition: values, gradients, and gradients of gradients, as numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longread.ops.attention import attention
from longread.ops.attention.reference import reference_attention
from longread.ops.clipped_sgd import clipped_sgd, clipped_sgd_, refused
from longread.ops.clipped_sgd.reference import reference_clipped_sgd
from longread.ops.cross_entropy import chunked, cross_entropy
from longread.ops.cross_entropy.reference import reference_cross_entropy
from longread.ops.fast_mlp import fast_mlp, fast_mlp_of_halves
from longread.ops.fast_mlp.reference import reference_fast_mlp
from longread.ops.linear import SharedWeight, linear
from longread.ops.needed import handed_on, needed_inputs
from longread.ops.rms_norm import rms_norm, rms_norm_and_input, shared_gain
from longread.ops.rms_norm.reference import reference_rms_norm
from longread.ops.swiglu import Activation, swiglu
from longread.ops.swiglu.reference import reference_swiglu

D64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = D64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def derivatives(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value of f, its gradients, and the gradients of a scalar made of these; the last also for the cotangent of f,
    which is an input of its gradient."""
    out = f(*inputs)
    cotangent = draw(*out.shape, seed=1)
    first = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
    mixed = sum((g * draw(*g.shape, seed=2 + i).detach()).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(mixed, [*inputs, cotangent], allow_unused=True)
    return [out, *first, *(g for g in second if g is not None)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_rms_norm() -> None:
    inputs = [draw(2, 5, 7), draw(7, seed=9)]
    agree(
        derivatives(lambda x, g: rms_norm(x, g, 1e-5), inputs),
        derivatives(lambda x, g: reference_rms_norm(x, g, 1e-5), inputs),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_without_gradients_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, gain = draw(2, 5, 7, dtype=dtype), draw(7, seed=9, dtype=torch.float32)
    with torch.no_grad():
        found = rms_norm(x, gain, 1e-5)
    assert torch.equal(found, rms_norm(x, gain, 1e-5))
    assert found.dtype == dtype


def test_rms_norm_whose_gain_is_held_constant() -> None:
    """As in the inner step: its gradient is asked for x alone, and then differentiated for the gain too."""
    x, gain, cotangent = draw(2, 5, 7), draw(7, seed=9), draw(2, 5, 7, seed=1)
    results = []
    for f in (rms_norm, reference_rms_norm):
        (dx,) = torch.autograd.grad(f(x, gain, 1e-5), [x], cotangent, create_graph=True)
        mixed = (dx * draw(2, 5, 7, seed=2).detach()).sum()
        results.append([dx, *torch.autograd.grad(mixed, [x, gain, cotangent])])
    agree(*results)


def test_a_shared_gain_gathers_the_gradient_of_all_its_uses() -> None:
    gain, x, results = draw(7, seed=9), draw(2, 5, 7), []
    for shared in (True, False):
        weight = shared_gain(gain) if shared else gain
        normed, beside = rms_norm_and_input(x, weight, 1e-5)
        out = rms_norm(normed.sin(), weight, 1e-5, residual=beside).cos().sum()
        (inner,) = torch.autograd.grad(out, [x], create_graph=True)  # as the inner step does
        results.append(torch.autograd.grad((inner * draw(2, 5, 7, seed=3).detach()).sum() + out, [x, gain]))
    agree(list(results[0]), list(results[1]))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(activation: Activation) -> None:
    inputs = [(2 * draw(30, 5).detach()).requires_grad_(), draw(30, 5, seed=9)]
    agree(
        derivatives(lambda a, b: swiglu(a, b, activation), inputs),
        derivatives(lambda a, b: reference_swiglu(a, b, activation), inputs),
    )


def test_gates_by_hand() -> None:
    a, b = torch.tensor([-1.5, 0.0, 0.5, 2.0], dtype=D64), torch.tensor([3.0, 5.0, -1.0, 7.0], dtype=D64)
    silu = [x / (1 + math.exp(-x)) * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    gelu = [
        x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * y
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    torch.testing.assert_close(swiglu(a, b), torch.tensor(silu, dtype=D64))
    torch.testing.assert_close(swiglu(a, b, "gelu_tanh"), torch.tensor(gelu, dtype=D64))


def test_fast_mlp_is_one_mlp_per_sequence() -> None:
    x, gate, up, down = draw(3, 4, 6), draw(3, 8, 6, seed=1), draw(3, 8, 6, seed=2), draw(3, 6, 8, seed=3)
    alone = [
        (torch.nn.functional.silu(x[b] @ gate[b].t()) * (x[b] @ up[b].t())) @ down[b].t() for b in range(x.shape[0])
    ]
    torch.testing.assert_close(fast_mlp(x, gate, up, down), torch.stack(alone))
    gelu = torch.nn.GELU(approximate="tanh")
    alone = [(gelu(x[b] @ gate[b].t()) * (x[b] @ up[b].t())) @ down[b].t() for b in range(x.shape[0])]
    torch.testing.assert_close(fast_mlp(x, gate, up, down, "gelu_tanh"), torch.stack(alone))


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("chunk", [4, 11, 64])
def test_cross_entropy_in_any_chunks(chunk: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    targets = torch.tensor([[0, 10, 3], [4, 7, 8]])
    inputs = [draw(2, 3, 5), draw(11, 5, seed=9)]
    agree(
        derivatives(lambda h, e: cross_entropy(h, e, targets, soft_cap), inputs),
        derivatives(lambda h, e: reference_cross_entropy(h, e, targets, soft_cap), inputs),
    )


@pytest.mark.parametrize("wanted", [[0], [1]], ids=["hidden", "head"])
def test_soft_capped_cross_entropy_differentiated_for_one_of_both(
    wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the inner step, which asks for the hidden states alone; the second derivative is for both."""
    monkeypatch.setattr(chunked, "CHUNK", 4)
    targets, inputs = torch.tensor([0, 10, 3]), [draw(3, 5), draw(11, 5, seed=9)]
    results = []
    for f in (cross_entropy, reference_cross_entropy):
        (first,) = torch.autograd.grad(f(*inputs, targets, 2.0).sin().sum(), [inputs[wanted[0]]], create_graph=True)
        results.append([first, *torch.autograd.grad((first * draw(*first.shape, seed=3).detach()).sum(), inputs)])
    agree(*results)


def test_soft_capped_cross_entropy_by_hand() -> None:
    hidden, head = (
        torch.tensor([[2.0, -1.0]], dtype=D64),
        torch.tensor([[3.0, 0.0], [0.0, 1.0], [-5.0, 2.0]], dtype=D64),
    )
    logits = [4 * math.tanh(raw / 4) for raw in (6, -1, -12)]
    expected = [math.log(sum(math.exp(z) for z in logits)) - logits[1]]
    torch.testing.assert_close(cross_entropy(hidden, head, torch.tensor([1]), 4.0), torch.tensor(expected, dtype=D64))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_cross_entropy_never_holds_all_logits(soft_cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 16)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    hidden, head, targets = draw(40, 2), draw(100, 2, seed=1), torch.arange(40)
    with Watch():
        (first,) = torch.autograd.grad(
            cross_entropy(hidden, head, targets, soft_cap).sum(), [hidden], create_graph=True
        )
        torch.autograd.grad(first.sin().sum(), [hidden, head])
    assert max(sizes) == 40 * 16


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_cross_entropy_weighs_its_second_derivative(soft_cap: float | None) -> None:
    """The adjoint of the losses is an input of the gradient too."""
    targets = torch.tensor([1, 0, 4])
    hidden, head, weight = draw(3, 5), draw(6, 5, seed=1), draw(3, seed=2)

    results = []
    for f in (cross_entropy, reference_cross_entropy):
        first = torch.autograd.grad(
            (f(hidden, head, targets, soft_cap) * weight).sum(), [hidden, head], create_graph=True
        )
        mixed = sum((g * draw(*g.shape, seed=3).detach()).sum() for g in first)
        results.append([*first, *torch.autograd.grad(mixed, [hidden, head, weight])])
    agree(*results)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40, 41, 64])
@pytest.mark.parametrize(("queries", "past"), [(41, 0), (40, 1), (7, 33), (1, 9), (1, 0), (23, 70)])
def test_attention_at_order_1_is_the_reference(window: int | None, queries: int, past: int) -> None:
    q, k, v = draw(2, 3, queries, 4), draw(2, 3, past + queries, 4, seed=1), draw(2, 3, past + queries, 4, seed=2)
    older, own = (k[:, :, :past], v[:, :, :past]), (k[:, :, past:], v[:, :, past:])
    results = []
    for f in (
        lambda: attention(q, *own, past=older, window=window, order=1),
        lambda: reference_attention(q, *own, past=older, window=window),
    ):
        out = f()
        weight = draw(*out.shape, seed=3).detach()
        results.append([out, *torch.autograd.grad((out * weight).sum(), [q, k, v])])
    agree(*results)


def test_attention_at_order_2_follows_its_definition() -> None:
    """Token by token, with no mask anywhere."""
    window, past, T = 3, 2, 5
    q, k, v = draw(1, 1, T, 4), draw(1, 1, past + T, 4, seed=1), draw(1, 1, past + T, 4, seed=2)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(T):
            seen = slice(max(0, past + t - window + 1), past + t + 1)
            p = (k[0, 0, seen] @ q[0, 0, t] / 2.0).exp()
            rows.append((p / p.sum()) @ v[0, 0, seen])
        return torch.stack(rows)[None, None]

    def with_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        older = k[:, :, :past], v[:, :, :past]
        return attention(q, k[:, :, past:], v[:, :, past:], past=older, window=window, order=2)

    agree(derivatives(with_past, [q, k, v]), derivatives(by_hand, [q, k, v]))


def test_attention_without_a_past() -> None:
    q, k, v = (draw(1, 2, 6, 4, seed=i) for i in range(3))
    for order in (0, 1, 2):
        for empty in (None, (k[:, :, :0], v[:, :, :0])):
            agree([attention(q, k, v, past=empty, window=3, order=order)], [reference_attention(q, k, v, window=3)])


def test_attention_refuses_what_it_cannot_answer() -> None:
    q, k = draw(1, 1, 4, 2), draw(1, 1, 3, 2)
    with pytest.raises(ValueError, match="4 queries for 3 keys; older keys belong into past"):
        attention(q, k, k, window=None, order=1)
    with pytest.raises(ValueError, match="order is 3"):
        attention(k, k, k, window=None, order=3)


@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
def test_clipped_sgd(clip: float | None) -> None:
    weights, gradients = [draw(3, 4, 5), draw(3, 2, seed=1)], [draw(3, 4, 5, seed=2), draw(3, 2, seed=3)]
    with torch.no_grad():  # one sequence below the threshold, two above
        for g in gradients:
            g[0] *= 0.05
    results = []
    for f in (clipped_sgd, reference_clipped_sgd):
        new, norm = f(weights, gradients, lr=0.7, clip=clip)
        total = sum((w * draw(*w.shape, seed=5 + i).detach()).sum() for i, w in enumerate(new))
        results.append([*new, norm, *torch.autograd.grad(total, weights + gradients)])
    agree(*results)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipped_sgd_in_place(clip: float | None) -> None:
    weights, gradients = [draw(3, 4, 5).detach(), draw(3, 2, seed=1).detach()], [draw(3, 4, 5, seed=2), draw(3, 2)]
    expected, expected_norm = reference_clipped_sgd(weights, gradients, lr=0.7, clip=clip)
    working = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    with torch.no_grad():
        norm = clipped_sgd_(weights, gradients, working, lr=0.7, clip=clip)
    agree([*weights, norm], [*expected, expected_norm])
    assert all(torch.equal(copy, w.bfloat16()) for copy, w in zip(working, weights, strict=True))


@pytest.mark.parametrize("clip", [None, 3.0])
def test_a_guard_refuses_steps_that_are_too_long_or_no_numbers(clip: float | None) -> None:
    weight, max_step_norm = draw(5, 4, 5).detach(), torch.tensor(1.0)
    gradient = torch.ones(5, 4, 5, dtype=D64) * torch.tensor([0.01, 10.0, math.nan, math.inf, 0.0]).view(-1, 1, 1)
    (free,), _ = clipped_sgd([weight], [gradient], lr=0.7, clip=clip)
    (new,), norm = clipped_sgd([weight], [gradient], lr=0.7, clip=clip, max_step_norm=max_step_norm)
    assert torch.equal(new[0], free[0])
    assert not torch.equal(new[0], weight[0])
    assert torch.equal(new[1:], weight[1:])
    assert refused(norm, lr=0.7, clip=clip, max_step_norm=max_step_norm).tolist() == [False, True, True, True, False]


def test_clipped_sgd_is_finite_at_zero() -> None:
    weight, gradient = draw(2, 3), torch.zeros(2, 3, dtype=D64, requires_grad=True)
    (new,), norm = clipped_sgd([weight], [gradient], lr=1.0, clip=1.0)
    (adjoint,) = torch.autograd.grad(new.sum(), [gradient])
    assert norm.tolist() == [0.0, 0.0]
    torch.testing.assert_close(adjoint, torch.full_like(adjoint, -1.0))


@pytest.mark.parametrize("leaves", list(itertools.product([True, False], repeat=2)))
def test_a_backward_pass_knows_what_it_is_asked_for(leaves: tuple[bool, bool]) -> None:
    asked = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            asked.append(needed_inputs(ctx))
            a, b = ctx.saved_tensors
            return g * b, g * a

    a, b = (draw(2, seed=i) if leaf else draw(2, seed=i) * 1 for i, leaf in enumerate(leaves))
    for wanted in ([a], [b], [a, b]):
        torch.autograd.grad(Product.apply(a, b).sum(), wanted, retain_graph=True)
    Product.apply(a, b).sum().backward()
    assert asked == [(True, False), (False, True), (True, True), (True, True)]


def test_low_precision_follows_the_reference() -> None:
    x, gain = draw(4, 64, dtype=torch.bfloat16), draw(64, seed=1, dtype=torch.float32)
    assert torch.equal(rms_norm(x, gain, 1e-6), reference_rms_norm(x, gain, 1e-6))
    head, targets = draw(32, 64, seed=2, dtype=torch.float32), torch.tensor([0, 5, 31, 7])
    nll = cross_entropy(x, head, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, reference_cross_entropy(x.double(), head, targets).float(), rtol=0.02, atol=0.05)


def test_clipped_sgd_steps_in_the_precision_of_the_weights() -> None:
    """Gradients come in the type of the products; a step far below its rounding must not be lost."""
    weight, gradient = draw(2, 50, dtype=torch.float32), draw(2, 50, seed=1, dtype=torch.bfloat16)
    (new,), norm = clipped_sgd([weight], [gradient], lr=1e-4, clip=1.0)
    expected, expected_norm = reference_clipped_sgd([weight], [gradient.float()], lr=1e-4, clip=1.0)
    torch.testing.assert_close(new, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm, expected_norm)
    (adjoint,) = torch.autograd.grad(new.sum(), [gradient])
    assert adjoint.dtype == torch.bfloat16


def test_a_shared_weight_gathers_the_gradient_of_all_its_uses() -> None:
    weight, x, z = draw(5, 3), draw(2, 4, 3, seed=1), draw(7, 3, seed=2)
    results = []
    for shared in (True, False):
        product = SharedWeight(weight, D64) if shared else (lambda y: torch.nn.functional.linear(y, weight))
        out = product(x).sin().sum() + product(z).cos().sum()
        (inner,) = torch.autograd.grad(out, [x], create_graph=True)  # as the inner step does
        total = (inner * draw(*inner.shape, seed=3).detach()).sum() + out
        results.append(torch.autograd.grad(total, [weight, x, z]))
    agree(list(results[0]), list(results[1]))


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_a_shared_weight_and_its_bias_under_an_inner_step(frozen: str | None) -> None:
    """The bias bends the inner gradient without a part in it, and is used before and after the step."""
    weight, bias, x, fast = draw(5, 3), draw(5, seed=1), draw(2, 4, 3, seed=2), draw(3, 3, seed=3)
    wanted = {"weight": weight, "bias": bias, "x": x, "fast": fast}
    for name, tensor in wanted.items():
        tensor.requires_grad_(name != frozen)
    given = [tensor for name, tensor in wanted.items() if name != frozen]
    results = []
    for shared in (True, False):
        product = SharedWeight(weight, D64, bias) if shared else (lambda y: torch.nn.functional.linear(y, weight, bias))
        out = product(x @ fast).sin().sum() + product(x).cos().sum()
        (inner,) = torch.autograd.grad(out, [fast], create_graph=True)
        after = product(x @ (fast - 0.3 * inner)).sin()
        results.append([out, inner, after, *torch.autograd.grad(out + after.sum(), given)])
    agree(*results)


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_with_a_wider_weight_at_both_orders(biased: bool) -> None:
    """The type of x is float32 and that of the weight float64, so that one cannot be told from the other's product."""
    x, weight, bias = draw(2, 4, 3, dtype=torch.float32), draw(5, 3, seed=1), draw(5, seed=2) if biased else None
    given = [x, weight] if bias is None else [x, weight, bias]
    plain = lambda x, w, b: torch.nn.functional.linear(x.double(), w, b)  # noqa: E731
    results = []
    for product in (linear, plain):
        out = product(x, weight, bias).sin().sum()
        first = torch.autograd.grad(out, given, create_graph=True)
        assert [g.dtype for g in first] == [g.dtype for g in given]
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first) + out, given)])
        results[-1] += torch.autograd.grad(product(x, weight, bias).sin().sum(), given)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_several_weights_shared_as_one(biased: bool) -> None:
    weights, biases = [draw(5, 3), draw(2, 3, seed=4)], [draw(5, seed=5), draw(2, seed=6)] if biased else []
    x, results = draw(2, 4, 3, seed=1), []
    for shared in (True, False):
        one = SharedWeight(weights, D64, biases or None)
        out = torch.zeros((), dtype=D64)
        for scale in (1.0, -0.5):
            if shared:
                first, second = one(x * scale).split([5, 2], dim=-1)
            else:
                pairs = zip(weights, biases or [None, None], strict=True)
                first, second = (torch.nn.functional.linear(x * scale, *pair) for pair in pairs)
            out = out + first.sin().sum() + (second * first[..., :2]).sum()
        (inner,) = torch.autograd.grad(out, [x], create_graph=True)
        total = (inner * draw(*inner.shape, seed=3).detach()).sum() + out
        results.append(torch.autograd.grad(total, [*weights, *biases, x]))
    agree(list(results[0]), list(results[1]))


@pytest.mark.parametrize("biased", [False, True])
def test_several_wider_weights_as_one(biased: bool) -> None:
    weights, biases = [draw(5, 3), draw(2, 3, seed=4)], [draw(5, seed=5), draw(2, seed=6)] if biased else []
    results = []
    for dtype in (torch.float32, D64):  # of float64 the weights are not cast
        x = draw(2, 4, 3, seed=1).detach().to(dtype).requires_grad_()
        out = linear(x, weights, biases or None)
        parts = torch.cat([linear(x, *pair) for pair in zip(weights, biases or [None, None], strict=True)], dim=-1)
        torch.testing.assert_close(out, parts)
        first = torch.autograd.grad(out.sin().sum(), [x, *weights, *biases], create_graph=True)
        total = sum((g * draw(*g.shape, seed=3 + i).detach()).sum() for i, g in enumerate(first)) + out.sum()
        results.append([*first, *torch.autograd.grad(total, [x, *weights, *biases])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)


def test_a_shared_weight_refuses_to_have_its_gradient_recorded() -> None:
    weight, x = draw(5, 3), draw(4, 3, seed=1)
    with pytest.raises(RuntimeError, match="taken once, at the end"):
        torch.autograd.grad(SharedWeight(weight, D64)(x).sin().sum(), [weight], create_graph=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("masked", [(), (0,), (0, 1), (2,)])
def test_fast_mlp_and_all_its_derivatives(masked: tuple[int, ...], activation: Activation) -> None:
    """Also where only some inputs want a gradient, as in the inner step."""
    inputs = [draw(3, 4, 6), draw(3, 8, 6, seed=1), draw(3, 8, 6, seed=2), draw(3, 6, 8, seed=3)]
    wanted = [x for i, x in enumerate(inputs) if i not in masked]
    results = []
    for f in (fast_mlp, reference_fast_mlp):
        out = f(*inputs, activation)
        first = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)
        mixed = sum((g * draw(*g.shape, seed=5 + i).detach()).sum() for i, g in enumerate(first))
        results.append([out, *first, *torch.autograd.grad(mixed, inputs)])
    agree(*results)


def test_fast_mlp_under_autocast() -> None:
    """Products are of another type than what they are added to."""
    inputs = [draw(3, 4, 6), draw(3, 8, 6, seed=1), draw(3, 8, 6, seed=2), draw(3, 6, 8, seed=3)]
    inputs = [x.detach().float().requires_grad_() for x in inputs]

    def gradients(f: Callable[..., Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(f(*inputs).float().sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs)]

    exact = gradients(reference_fast_mlp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = gradients(fast_mlp), gradients(reference_fast_mlp)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert 0 < (a - c).norm() <= 2 * (b - c).norm()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_fast_mlp_of_halves_and_all_its_derivatives(activation: Activation) -> None:
    inputs = [draw(3, 4, 6), draw(3, 16, 6, seed=1), draw(3, 6, 8, seed=3)]
    agree(
        derivatives(lambda x, both, down: fast_mlp_of_halves(x, both, down, activation), inputs),
        derivatives(lambda x, both, down: reference_fast_mlp(x, *both.chunk(2, dim=1), down, activation), inputs),
    )


def test_what_a_derivative_leaves_for_an_input_comes_to_the_op_itself() -> None:
    """Apart from its own gradient, also where it alone comes, and not for what takes none."""
    came: list[list[bool]] = []

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            read = handed_on(ctx, x, y)
            ctx.save_for_backward(*read)
            ctx.set_materialize_grads(False)
            return x**3 * y, *read

        @staticmethod
        def backward(ctx: Any, d: Tensor | None, left_x: Tensor | None, left_y: Tensor | None) -> tuple[Any, Any]:
            came.append([d is not None, left_x is not None, left_y is not None])
            x, y = ctx.saved_tensors
            own = torch.zeros_like(x) if d is None else 3 * x**2 * y * d
            return own if left_x is None else own + left_x, None

    x, y = draw(3), draw(3, seed=1).detach()
    (first,) = torch.autograd.grad(Cube.apply(x, y)[0].sum(), [x], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), [x])
    torch.testing.assert_close(second, 6 * x * y)
    out = Cube.apply(x, y)[0].sum()
    (first,) = torch.autograd.grad(out, [x], create_graph=True)
    (both,) = torch.autograd.grad(first.sum() + out, [x])
    torch.testing.assert_close(both, 6 * x * y + 3 * x**2 * y)
    assert came == [[True, False, False], [False, True, False], [True, False, False], [True, True, False]]
