"""Attention over a past without a gradient on one thread of a CPU, against the reference; and when it answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longread.ops.attention import attention, inner
from longread.ops.attention.reference import reference_attention

T, H = 5, 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(N: int, G: int, P: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """query, key and value, which take a gradient, and a past that does not."""
    generator = torch.Generator().manual_seed(N + P)
    shapes = [(2, N, T, H), (2, G, T, H), (2, G, T, H), (2, G, P, H), (2, G, P, H)]
    query, key, value, *past = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [x.requires_grad_() for x in (query, key, value)], (past[0], past[1])


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that it is this code that answers."""
    found, asked = list[int](), inner._Attention.apply

    def apply(*args: object) -> object:
        found.append(1)
        return asked(*args)

    monkeypatch.setattr(inner._Attention, "apply", apply)
    return found


@pytest.mark.parametrize(("N", "G"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize(("P", "window"), [(9, None), (9, 30), (9, 8), (9, 6), (5, 6), (12, 11)])
@pytest.mark.parametrize("laid_out", ["heads first", "tokens first"])
def test_values_and_gradients_are_those_of_the_reference(
    N: int, G: int, P: int, window: int | None, laid_out: str, answers: list[int]
) -> None:
    own, past = draw(N, G, P)
    if laid_out == "tokens first":
        own = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in own]
    weights = torch.randn(2, N, T, H, dtype=torch.float64)
    results = []
    for function, options in ((attention, {"order": 1}), (reference_attention, {})):
        out = function(*own, past=past, window=window, **options)
        results.append([out, *torch.autograd.grad(out, own, weights, retain_graph=True)])
        results[-1] += torch.autograd.grad(out, own, weights)  # a run that is kept may serve again
    assert answers == [1]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_other_inputs_are_left_to_the_fused_kernel(answers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    own, past = draw(3, 3, 9)

    def answered(own: list[Tensor], past: tuple[Tensor, Tensor], window: int | None = 8, order: int = 1) -> bool:
        answers.clear()
        attention(*own, past=past, window=window, order=order)
        return bool(answers)

    assert answered(own, past)
    assert not answered(own, past, order=0)
    assert not answered(own, past, order=2)
    assert not answered(own, (past[0].clone().requires_grad_(), past[1]))
    assert not answered(own, past, window=5)  # fewer older tokens than own ones
    assert not answered([x.detach() for x in own], past)
    assert not answered(*draw(3, 3, 9, torch.bfloat16))
    with torch.no_grad():
        assert not answered(own, past)
    monkeypatch.setattr(inner, "MOST_WEIGHTS", 2 * 3 * T * (7 + T) - 1)
    assert not answered(own, past)
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert not inner.pays(own[0], past, 8)


def test_it_is_not_differentiated_twice() -> None:
    own, past = draw(3, 3, 9)
    out = attention(*own, past=past, window=8, order=1)
    (gradient, *_) = torch.autograd.grad(out.square().sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
