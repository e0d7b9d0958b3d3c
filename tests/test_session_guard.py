"""A session that learning cannot break: steps that are refused, and learning that is taken back."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop import begin, read, step
from longread.inner_loop.step import matrices, step_norm_limit
from longread.model import Transformer
from longread.session import Session
from tests.tiny import INNER, M, make


def text(n: int, seed: int = 0) -> Tensor:
    return torch.randint(19, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def broken_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Positions at which the gradient of a mini-batch is not a number."""
    where: set[int] = set()
    right = step.inner_gradient

    def wrong(*args, start, **kwargs):  # type: ignore[no-untyped-def]
        found = right(*args, start=start, **kwargs)
        return found._replace(gradients=tuple(g * math.nan for g in found.gradients)) if start in where else found

    monkeypatch.setattr(step, "inner_gradient", wrong)
    return where


@pytest.mark.parametrize("pieces", [[33], [5] * 6 + [3], [1] * 33], ids=["at once", "in pieces", "token by token"])
def test_a_gradient_that_is_no_number_is_not_learned_from(pieces: list[int], broken_steps: set[int]) -> None:
    """Everything else goes on as if that mini-batch had been masked."""
    broken_steps.add(2 * M)
    session, tokens = Session(make(), INNER), text(33)
    nll = torch.cat([session.read(part) for part in tokens.split(pieces)])
    assert session.rolled_back == 1
    assert session.steps == 8
    assert nll[1:].isfinite().all()
    broken_steps.clear()
    mask = torch.ones(1, 33, dtype=torch.bool)
    mask[:, 2 * M + 1 : 3 * M + 1] = False
    masked = read(make(), begin(make()), tokens[None], inner=INNER, loss_mask=mask)
    torch.testing.assert_close(nll[1:], masked.nll[0, 1:], rtol=1e-4, atol=1e-5)


def test_writing_is_guarded_too(broken_steps: set[int]) -> None:
    broken_steps.add(2 * M)
    session = Session(make(), INNER)
    session.read(text(6))
    list(session.generate(3 * M, seed=0))
    assert session.rolled_back == 1
    assert session.steps == 4
    assert session.describe().rolled_back == 1
    assert math.isfinite(session.drift())


def test_a_step_longer_than_the_weights_is_refused() -> None:
    model, wild = make(), InnerConfig(lr=1e6, clip=None)
    assert step_norm_limit(model) == pytest.approx(
        math.sqrt(sum(w.square().sum().item() for w in matrices(model.initial_fast_weights(1))))
    )
    session = Session(model, wild)
    nll = session.read(text(6 * M + 1))
    frozen = Session(model, wild, learn=False).read(text(6 * M + 1))
    assert session.rolled_back == session.steps == 6
    assert session.drift() == 0.0
    torch.testing.assert_close(nll, frozen, equal_nan=True)


def test_one_sequence_of_a_batch_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.inner_gradient

    def wrong(*args, **kwargs):  # type: ignore[no-untyped-def]
        found = right(*args, **kwargs)
        spoiled = [g * torch.tensor([1.0, math.inf, 1.0]).view(3, 1, 1) for g in found.gradients]
        return found._replace(gradients=tuple(spoiled))

    model, tokens = make(), torch.stack([text(2 * M + 1, seed=i) for i in range(3)])
    expected = read(model, begin(model, 3), tokens, inner=INNER)
    monkeypatch.setattr(step, "inner_gradient", wrong)
    found = read(model, begin(model, 3), tokens, inner=INNER, guard=True)
    assert found.rolled_back.tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert not expected.rolled_back.any()
    for now, before, initial in zip(
        matrices(found.state.fast), matrices(expected.state.fast), matrices(begin(model, 3).fast), strict=True
    ):
        assert torch.equal(now[[0, 2]], before[[0, 2]])
        assert torch.equal(now[1], initial[1])


def test_without_a_guard_nothing_is_hidden() -> None:
    """Evaluation shows divergence as it is."""
    model = make()
    found = read(model, begin(model), text(6 * M)[None], inner=InnerConfig(lr=1e30, clip=None))
    assert not found.nll[:, 2 * M :].isfinite().all()


def certain(model: Transformer, factor: float = 60.0) -> Transformer:
    """A model with large logits: it can be wrong by many nats."""
    with torch.no_grad():
        model.final_norm.weight.mul_(factor)
    return model


def astray(model: Transformer, tokens: Tensor) -> Session:
    """A reader whose fast weights have gone wrong without any step that could have been refused."""
    session = Session(model, INNER)
    session.read(tokens)
    worst, cost = session.state, 0.0
    for seed in range(6):
        noise = torch.Generator().manual_seed(seed)
        fast = tuple(
            type(block)(*(w + 2 * torch.randn(w.shape, generator=noise) for w in block)) for block in session.state.fast
        )
        state = dataclasses.replace(session.state, fast=fast)
        found = read(model, state, tokens[None], inner=INNER, learn=False).nll.mean().item()
        worst, cost = (state, found) if found > cost else (worst, cost)
    return Session.resume(model, INNER, worst, recent=session.recent, steps=session.steps)


def test_learning_that_has_gone_astray_is_taken_back() -> None:
    model, tokens = certain(make(mini_batch_size=32)), text(400, seed=3)
    # a text that the untouched model finds easy: its own greedy continuation
    teacher = Session(model, INNER, learn=False)
    teacher.read(tokens[:8])
    easy = torch.tensor(list(teacher.generate(200, temperature=0)))
    session = astray(model, easy[:40])
    steps = session.steps
    bad = session.read(easy[40:120])
    assert bad.mean() > math.log(19) + 1
    assert session.rolled_back == session.steps - steps == 2
    assert session.drift() == 0.0
    assert session.read(easy[120:]).mean() < bad.mean() - 1


def test_a_strange_text_is_no_reason_to_forget() -> None:
    model = certain(make(mini_batch_size=32))
    session = Session(model, INNER)
    costs = [session.read(part).nanmean() for part in text(200).split(100)]
    assert min(costs) > math.log(19) + 1
    assert session.rolled_back == 0
    assert session.drift() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_guard_works_in_cuda_graphs(dtype: torch.dtype) -> None:
    """Every long step of a captured reading is refused, and none of a tame one."""
    captured = importlib.import_module("longread.inner_loop.captured")
    model = make(width=32, mini_batch_size=16, window_size=64).cuda()
    model.compute_dtype = dtype
    tokens = text(16 * 40 + 1).cuda()
    for inner, refused in ((INNER, False), (InnerConfig(lr=1e7, clip=None), True)):
        session = Session(model, inner)
        nll = session.read(tokens)
        assert nll[1:].isfinite().all()
        assert session.steps == 40
        assert session.rolled_back == (40 if refused else 0)
        assert (session.drift() == 0.0) == refused
    assert {key[2] for key in captured._READERS[model]} == {True}
