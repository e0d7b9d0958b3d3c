"""The step by a rule and the guard around it, by hand; and that reading hands it what a config says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig, UserError
from longread.inner_loop import begin, optimizer_named, read, reading, register_inner_optimizer
from longread.inner_loop.optimizers import CLIPPED_SGD, InnerOptimizer
from longread.inner_loop.step import matrices
from longread.ops.clipped_sgd import clipped_sgd
from tests.tiny import INNER, M, make, text


def halved(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float | Tensor, clip: float | None
) -> list[Tensor]:
    """W − lr · g / 2, or a step of nothing where nothing is clipped: so both settings can be told."""
    return [w - (0 if clip is None else lr / 2) * g for w, g in zip(weights, gradients, strict=True)]


def one_too_far(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
    """Of every sequence but the first, a step that no guard lets pass."""
    return [torch.cat([w[:1] - 1e-3 * g[:1], w[1:] + 1e6]) for w, g in zip(weights, gradients, strict=True)]


def another(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
    return list(weights)


register_inner_optimizer("halved", halved)
register_inner_optimizer("one_too_far", one_too_far)
WEIGHTS = [torch.ones(4, 2, 3, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)]


def gradients() -> list[Tensor]:
    """Of four sequences, with the norms 5, 10, NaN and 0: in one matrix 3, 6, ..., in the other 4, 8, ..."""
    sizes = torch.tensor([1.0, 2.0, math.nan, 0.0], dtype=torch.float64)
    made = [torch.zeros_like(w) for w in WEIGHTS]
    made[0][:, 0, 1], made[1][:, 1] = 3 * sizes, 4 * sizes
    return made


def test_a_step_is_what_the_rule_gives_and_the_norm_of_the_gradient_before_it() -> None:
    given = [g.requires_grad_() for g in gradients()]
    found = InnerOptimizer(halved).step(WEIGHTS, given, lr=0.5, clip=1.0)
    torch.testing.assert_close(found.weights, tuple(halved(WEIGHTS, given, lr=0.5, clip=1.0)), equal_nan=True)
    torch.testing.assert_close(found.grad_norm, given[0].new_tensor([5, 10, math.nan, 0]), equal_nan=True)
    assert not found.grad_norm.requires_grad
    assert found.weights[0].requires_grad
    assert found.refused is None


def test_the_guard_refuses_longer_steps_than_the_longest_and_what_is_no_number() -> None:
    """Steps of 5/4, 10/4, NaN and 0: the first is exactly as long as it may be."""
    found = InnerOptimizer(halved).step(
        WEIGHTS, gradients(), lr=0.5, clip=1.0, max_step_norm=torch.tensor(1.25).double()
    )
    assert found.refused is not None
    assert found.refused.tolist() == [False, True, True, False]
    for new, w, g in zip(found.weights, WEIGHTS, gradients(), strict=True):
        torch.testing.assert_close(new, torch.cat([(w - g / 4)[:1], w[1:]]), rtol=0, atol=0)


def test_a_rule_that_answers_a_gradient_of_no_number_with_a_short_step_is_refused() -> None:
    found = InnerOptimizer(another).step(
        WEIGHTS, gradients(), lr=0.5, clip=1.0, max_step_norm=torch.tensor(1.25).double()
    )
    assert found.refused is not None
    assert found.refused.tolist() == [False, False, True, False]


def test_gradients_come_to_the_rule_in_the_type_of_the_weights() -> None:
    narrow = [g.nan_to_num().bfloat16() for g in gradients()]
    found = InnerOptimizer(halved).step(WEIGHTS, narrow, lr=0.5, clip=1.0)
    assert {w.dtype for w in found.weights} == {torch.float64} == {found.grad_norm.dtype}
    torch.testing.assert_close(found.weights, InnerOptimizer(halved).step(WEIGHTS, narrow, lr=0.5, clip=1.0).weights)


@pytest.mark.parametrize("wrong", [lambda w: w[:, :1], lambda w: w.float()], ids=["shape", "type"])
def test_a_rule_that_gives_something_else_is_refused(wrong: object) -> None:
    optimizer = InnerOptimizer(lambda weights, gradients, *, lr, clip: [*map(wrong, weights)])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="gives other shapes or types than those of the weights"):
        optimizer.step(WEIGHTS, gradients(), lr=0.5, clip=1.0)


@pytest.mark.parametrize("optimizer", [InnerOptimizer(halved), CLIPPED_SGD], ids=["a rule", "sgd"])
@pytest.mark.parametrize("max_step_norm", [None, 0.6])
@pytest.mark.parametrize(("lr", "clip"), [(0.5, 7.0), (0.05, 7.0), (0.5, 1.0), (0.05, None)])
def test_a_step_in_place_is_the_same_step(
    optimizer: InnerOptimizer, max_step_norm: float | None, lr: float, clip: float | None
) -> None:
    limit = None if max_step_norm is None else torch.tensor(max_step_norm, dtype=torch.float64)
    given = [g.nan_to_num() for g in gradients()]
    expected = optimizer.step(WEIGHTS, given, lr=lr, clip=clip, max_step_norm=limit)
    weights, working = [w.clone() for w in WEIGHTS], [torch.empty_like(w, dtype=torch.bfloat16) for w in WEIGHTS]
    found = optimizer.step_(weights, [g.clone() for g in given], working, lr=lr, clip=clip, max_step_norm=limit)
    for weight, copy, new, said in zip(weights, working, expected.weights, found.weights, strict=True):
        torch.testing.assert_close(weight, new)
        torch.testing.assert_close(said, new)
        assert torch.equal(copy, weight.bfloat16())
    torch.testing.assert_close(found.grad_norm, expected.grad_norm)
    assert (found.refused is None) == (expected.refused is None)


@pytest.mark.parametrize(("lr", "clip"), [(0.5, 7.0), (0.5, 1.0), (0.05, None)])
def test_the_rule_of_the_paper_can_be_called_as_others_are(lr: float, clip: float | None) -> None:
    given = [g.nan_to_num() for g in gradients()]
    found = optimizer_named("sgd").rule(WEIGHTS, given, lr=lr, clip=clip)
    torch.testing.assert_close(tuple(found), clipped_sgd(WEIGHTS, given, lr=lr, clip=clip)[0])
    scale = lr * (1 if clip is None else min(1.0, clip / 10))  # of the second sequence, whose gradient is 10 long
    assert found[0][1, 0, 1].item() == pytest.approx(1 - 6 * scale)


def test_a_name_is_given_once() -> None:
    with pytest.raises(UserError, match="there is an inner optimizer 'halved' already"):
        register_inner_optimizer("halved", another)
    assert optimizer_named("halved").rule is halved
    before = optimizer_named("halved")
    register_inner_optimizer("halved", halved)
    assert optimizer_named("halved") is before
    assert InnerConfig(optimizer="halved").optimizer == "halved"
    with pytest.raises(UserError, match="optimizer is 'never registered'"):
        InnerConfig(optimizer="never registered")


@pytest.mark.parametrize("pieces", [[3 * M + 1], [1] * (3 * M + 1)], ids=["at once", "token by token"])
def test_reading_takes_the_steps_of_the_rule_that_the_config_names(pieces: list[int]) -> None:
    """A rule that does not step at all without a clip reads as if it did not learn."""
    model, ids = make(3, torch.float64), torch.tensor([text(3 * M + 1), text(3 * M + 1, 1)])
    states = {}
    for clip in (0.5, None):
        state = begin(model, 2)
        for part in ids.split(pieces, 1):
            state = read(model, state, part, inner=InnerConfig(lr=0.7, clip=clip, optimizer="halved")).state
        states[clip] = matrices(state.fast)
    initial = matrices(begin(model, 2).fast)
    assert all(torch.equal(w, w0) for w, w0 in zip(states[None], initial, strict=True))
    assert not any(torch.equal(w, w0) for w, w0 in zip(states[0.5], initial, strict=True))


@pytest.mark.parametrize("pieces", [[3 * M + 1], [1] * (3 * M + 1)], ids=["at once", "token by token"])
def test_the_guard_of_reading_stands_around_every_rule(pieces: list[int]) -> None:
    """Each sequence for itself; and only where it is asked for."""
    model, ids = make(3, torch.float64), torch.tensor([text(3 * M + 1, seed) for seed in range(3)])
    inner, refused = InnerConfig(optimizer="one_too_far"), []
    state = begin(model, 3)
    for part in ids.split(pieces, 1):
        found = read(model, state, part, inner=inner, guard=True)
        state = found.state
        refused.append(found.rolled_back)
    assert torch.cat(refused, 1).tolist() == [[False] * 3, [True] * 3, [True] * 3]
    for w, w0 in zip(matrices(state.fast), matrices(begin(model, 3).fast), strict=True):
        assert torch.equal(w[1:], w0[1:])
    unguarded = read(model, begin(model, 3), ids, inner=inner)
    assert not unguarded.rolled_back.any()
    assert all((w[1:] > 1e5).all() for w in matrices(unguarded.state.fast))


@pytest.mark.parametrize("pieces", [[3 * M + 1], [1] * (3 * M + 1)], ids=["at once", "token by token"])
def test_the_paper_s_rule_is_guarded_only_where_that_is_asked_for(pieces: list[int]) -> None:
    model, ids, far = make(3, torch.float64), torch.tensor([text(3 * M + 1)]), InnerConfig(lr=1e9, clip=None)
    states = {}
    for guard in (None, False, True):
        state, refused = begin(model), 0
        for part in ids.split(pieces, 1):
            found = read(model, state, part, inner=far, **({} if guard is None else {"guard": guard}))
            state, refused = found.state, refused + int(found.rolled_back.sum())
        states[guard] = matrices(state.fast)
        assert refused == (3 if guard else 0)
    for w, w0 in zip(states[True], matrices(begin(model).fast), strict=True):
        assert torch.equal(w, w0)
    for guard in (None, False):
        assert not any(torch.equal(a, b) for a, b in zip(states[guard], states[True], strict=True))


def test_frozen_reading_in_stretches_is_reading_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(3, torch.float64), torch.tensor([text(11), text(11, 1)])
    whole = read(model, begin(model, 2), ids, inner=INNER, learn=False, top=2)
    for stretch in (1, 3, 10, 11):
        monkeypatch.setattr(reading, "STRETCH", stretch)
        found = read(model, begin(model, 2), ids, inner=INNER, learn=False, top=2)
        torch.testing.assert_close(found.nll, whole.nll, rtol=1e-10, atol=1e-12, equal_nan=True)
        assert found.top is not None
        assert whole.top is not None
        assert torch.equal(found.top[1], whole.top[1])


@pytest.mark.parametrize("n", [1, M - 1, M, 3 * M, 3 * M + 2])
def test_a_state_keeps_the_window_and_what_waits_and_no_more(n: int) -> None:
    """A step looks back a window from its first token; below, the window alone."""
    model = make()
    K = model.config.window_size
    state = read(model, begin(model, 2), torch.tensor([text(n), text(n, 1)]), inner=INNER).state
    waiting = state.hidden.shape[1]
    assert 1 <= waiting <= M
    assert {past.key.shape[2] for past in state.lower_pasts} == {min(n, K)}  # type: ignore[union-attr]
    assert {past.key.shape[2] for past in state.upper_pasts} == {min(n, K + waiting)}  # type: ignore[union-attr]
