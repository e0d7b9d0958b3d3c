"""Ops at the edges of their contracts: limits met exactly, one row, one number, inputs that want no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longread.ops.clipped_sgd import clipped_sgd, clipped_sgd_, refused
from longread.ops.clipped_sgd.reference import reference_clipped_sgd
from longread.ops.cross_entropy import chunked, cross_entropy
from longread.ops.cross_entropy.reference import reference_cross_entropy
from longread.ops.key_value_binding import Memory, Waiting
from longread.ops.key_value_binding.reference import reference_key_value_binding
from longread.ops.linear import SharedWeight
from longread.ops.rms_norm import rms_norm
from longread.ops.rms_norm.reference import reference_rms_norm
from longread.ops.swiglu import swiglu
from longread.ops.swiglu.reference import reference_swiglu
from tests.test_ops import D64, agree, derivatives, draw

each_norm = pytest.mark.parametrize("norm", [rms_norm, reference_rms_norm])
each_step = pytest.mark.parametrize("step", [clipped_sgd, reference_clipped_sgd])


# Norms


@each_norm
def test_a_norm_is_turned_and_then_added_to_the_residual(norm: Callable[..., Tensor]) -> None:
    x, gain = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=D64), torch.tensor([1.0, 2.0], dtype=D64)
    rotary = torch.tensor([[1j], [-1]], dtype=torch.complex128)  # a quarter, and a half
    scale = math.sqrt(12.5)  # of both rows: [3, 4] and twice it
    expected = torch.tensor([[-8.0, 3.0], [-3.0, -8.0]], dtype=D64) / scale + torch.tensor([10.0, 20.0], dtype=D64)
    residual = torch.tensor([[10.0, 20.0]] * 2, dtype=D64)
    torch.testing.assert_close(norm(x, gain, 1e-15, residual=residual, rotary=rotary), expected)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 4, 7)])
def test_a_norm_of_any_number_of_rows(shape: tuple[int, ...]) -> None:
    inputs = [draw(*shape), draw(7, seed=9)]
    agree(
        derivatives(lambda x, g: rms_norm(x, g, 1e-5), inputs),
        derivatives(lambda x, g: reference_rms_norm(x, g, 1e-5), inputs),
    )


def test_the_gradient_of_a_gain_alone_is_differentiated_too() -> None:
    x, gain, cotangent = draw(2, 5, 7), draw(7, seed=9), draw(2, 5, 7, seed=1)
    results = []
    for norm in (rms_norm, reference_rms_norm):
        (found,) = torch.autograd.grad(norm(x, gain, 1e-5), [gain], cotangent, create_graph=True)
        results.append([found, *torch.autograd.grad((found * draw(7, seed=2).detach()).sum(), [x, cotangent])])
    agree(*results)


# Steps


def test_a_gradient_as_long_as_the_clip_is_not_clipped() -> None:
    """Nor is its derivative, −lr λ; a hair longer, what is along the gradient goes."""
    weight = torch.zeros(2, 2, dtype=D64)
    gradient = torch.tensor([[3.0, 4.0], [3.0, 4.0 + 1e-9]], dtype=D64, requires_grad=True)
    (new,), norm = clipped_sgd([weight], [gradient], lr=0.5, clip=5.0)
    assert new[0].tolist() == [-1.5, -2.0]
    assert norm[0] == 5.0
    (adjoint,) = torch.autograd.grad(new, [gradient], torch.tensor([[3.0, 4.0]] * 2, dtype=D64))
    assert adjoint[0].tolist() == [-1.5, -2.0]
    assert adjoint[1].norm() < 1e-8


@each_step
def test_norms_take_no_part_in_differentiation(step: Callable[..., tuple[tuple[Tensor, ...], Tensor]]) -> None:
    (new,), norm = step([draw(2, 3)], [draw(2, 3, seed=1)], lr=0.5, clip=1.0)
    assert new.requires_grad
    assert not norm.requires_grad


@pytest.mark.parametrize("wanted", [0, 1])
def test_of_some_gradients_alone(wanted: int) -> None:
    """Where only one of the inner gradients depends on what is differentiated."""
    results = []
    for step in (clipped_sgd, reference_clipped_sgd):
        weights, gradients = [draw(2, 3), draw(2, 4, seed=1)], [draw(2, 3, seed=2), draw(2, 4, seed=3)]
        gradients[1 - wanted] = gradients[1 - wanted].detach()
        new, _ = step(weights, gradients, lr=0.5, clip=0.3)
        results.append(list(torch.autograd.grad(sum(w.sin().sum() for w in new), [gradients[wanted], *weights])))
    agree(*results)


def test_a_step_as_long_as_the_guard_allows_is_taken() -> None:
    max_step_norm = torch.tensor(1.0)
    norms = torch.tensor([2.0, 2.0000002])
    assert refused(norms, lr=0.5, clip=None, max_step_norm=max_step_norm).tolist() == [False, True]
    assert refused(norms * 9, lr=0.5, clip=2.0, max_step_norm=max_step_norm).tolist() == [False, False]


def test_the_guard_holds_in_place_too() -> None:
    weight, gradient = torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    working = torch.full((2, 2), 7.0, dtype=torch.bfloat16)
    clipped_sgd_([weight], [gradient], [working], lr=0.5, clip=None, max_step_norm=torch.tensor(2.5))
    assert weight.tolist() == [[-1.5, -2.0], [0.0, 0.0]]
    assert torch.equal(working, weight.bfloat16())


# Losses


@pytest.mark.parametrize("chunk", [1, 5, 6])
@pytest.mark.parametrize("width", [1, 5])
def test_a_last_chunk_of_one_entry_and_a_hidden_state_of_one_number(
    chunk: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    targets = torch.tensor([[0, 10, 3], [4, 7, 5]])
    inputs = [draw(2, 3, width), draw(11, width, seed=9)]
    agree(
        derivatives(lambda h, e: cross_entropy(h, e, targets), inputs),
        derivatives(lambda h, e: reference_cross_entropy(h, e, targets), inputs),
    )


def test_the_gradient_of_the_hidden_state_alone_is_differentiated_too() -> None:
    """As in the inner step, which asks for the fast weights' gradient; and the head's alone."""
    targets = torch.tensor([1, 0, 4])
    hidden, head, weight = draw(3, 5), draw(6, 5, seed=1), draw(3, seed=2)
    for asked in (hidden, head):
        results = []
        for f in (cross_entropy, reference_cross_entropy):
            loss = (f(hidden, head, targets) * weight).sum()
            (found,) = torch.autograd.grad(loss, [asked], create_graph=True)
            mixed = (found * draw(*found.shape, seed=3).detach()).sum()
            results.append([found, *torch.autograd.grad(mixed, [hidden, head, weight])])
        agree(*results)


def test_a_vocabulary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the vocabulary is empty"):
        cross_entropy(draw(3, 5), draw(0, 5), torch.tensor([], dtype=torch.int64).expand(0))


# Products and bindings


def test_a_shared_weight_is_cast_once_and_its_gradient_is_of_its_own_type() -> None:
    weight, x = draw(5, 3, dtype=torch.float32), draw(4, 3, seed=1, dtype=torch.bfloat16).detach()
    out = SharedWeight(weight, torch.bfloat16)(x)
    assert torch.equal(out, x @ weight.bfloat16().t())
    (found,) = torch.autograd.grad(out.sum(), [weight])
    assert found.dtype == torch.float32
    assert torch.equal(found, x.sum(0).float().expand(5, 3))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gradient_of_a_shared_bias_is_summed_in_float32(device: str) -> None:
    """In bfloat16 a sum of ones ends at 256."""
    weight, bias = (draw(*n, seed=2).detach().to(device, torch.float32).requires_grad_() for n in ((5, 3), (5,)))
    product = SharedWeight(weight, torch.bfloat16, bias)
    x = torch.ones(301, 3, dtype=torch.bfloat16, device=device)
    outs = [product(x) for _ in range(7)]
    assert torch.equal(outs[0], torch.nn.functional.linear(x, weight.bfloat16(), bias.bfloat16()))
    found, of_weight = torch.autograd.grad(sum(out.sum() for out in outs), [bias, weight])
    assert found.dtype == of_weight.dtype == torch.float32
    assert torch.equal(found.cpu(), torch.full((5,), 2107.0))
    torch.testing.assert_close(of_weight.cpu(), torch.full((5, 3), 2107.0), rtol=0.01, atol=0)


def test_a_shared_weight_may_be_differentiated_again() -> None:
    weight, bias, x = draw(5, 3), draw(5, seed=2), draw(4, 3, seed=1)
    loss = SharedWeight(weight, D64, bias)(x).sin().sum()
    first, second = (torch.autograd.grad(loss, [weight, bias], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_binding_leaves_what_it_is_given_as_it_was() -> None:
    key, value, rate = draw(1, 2, 4, 3).detach(), draw(1, 2, 4, 3, seed=1).detach(), torch.ones(1, 2, 4, dtype=D64)
    memory = Memory(*(draw(1, 2, *shape).detach() for shape in ((5, 3), (5, 3), (3, 5))))
    before = [w.clone() for w in memory]
    none = Waiting(key[:, :, :0], value[:, :, :0], rate[:, :, :0])
    _, after, _ = reference_key_value_binding(
        None, Waiting(key, value, rate), memory, none, mini_batch_size=4, lr=0.1, clip=1.0
    )
    assert all(torch.equal(w, b) and not w.requires_grad for w, b in zip(memory, before, strict=True))
    assert not any(torch.equal(w, b) for w, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_in_half_precision(dtype: torch.dtype) -> None:
    """Its cube overflows float16, and its derivatives would be lost in the rounding of bfloat16."""
    numbers = torch.tensor([-200.0, -60.0, -3.0, -1.3, -0.1, 0.4, 1.7, 3.0, 60.0, 200.0])
    a, b = numbers.to(dtype).requires_grad_(), numbers.flip(0).div(64).to(dtype).requires_grad_()
    found = derivatives(lambda a, b: swiglu(a, b, "gelu_tanh"), [a, b])
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    expected = derivatives(lambda a, b: reference_swiglu(a, b, "gelu_tanh"), wide)
    assert {x.dtype for x in found[:3]} == {dtype}
    for actual, exact in zip(found, expected, strict=True):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 4 * torch.finfo(dtype).eps
