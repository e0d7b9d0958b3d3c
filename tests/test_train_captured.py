"""The gradient of a batch by a graph: it is the plain one, follows tokens and rate, and is given up where it is off."""

from __future__ import annotations

import pytest
import torch

from longread.data import Batch
from longread.inner_loop.graphs import GraphRefused
from longread.train import accumulate_gradient
from longread.train.captured import CapturedGradient
from tests.fake_graphs import FakeGraph, fake_graphs
from tests.meta_gradients import Case, batch, config, make

__all__ = ["fake_graphs"]
CASES = [Case("none"), Case("sqrt", micro_batch_size=2), Case("blocks", loss="static")]


def batches() -> list[Batch]:
    """With other tokens and other holes each."""
    return [Batch(*(x.roll(i, 1).roll(i, 0) for x in batch())) for i in range(2)]


@pytest.mark.parametrize(("case", "off"), [*((case, 0.0) for case in CASES), (CASES[0], 0.5)], ids=str)
def test_it_is_the_plain_gradient(
    case: Case,
    off: float,
    fake_graphs: type[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(fake_graphs, "off", off)
    plain, model = make(torch.float64), make(torch.float64)
    gradient = CapturedGradient(model, config(model, case))
    for each, rate in zip(batches(), (0.5, 0.25), strict=True):
        expected = accumulate_gradient(plain, config(plain, case), each, inner_lr=rate)
        found = gradient(each, inner_lr=rate)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        torch.testing.assert_close(found.inner_grad_norm, expected.inner_grad_norm, rtol=1e-10, atol=0)
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)
        for one in (plain, model):
            one.zero_grad(set_to_none=True)
    assert len(recwarn) == bool(off)


def test_what_it_says_of_a_graph_that_is_off(fake_graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_graphs, "off", 1e3)
    model = make(torch.float32)
    sentence = r"the captured step gives a loss or gradient norm [\d.]+% off; training goes on without"
    with pytest.warns(GraphRefused, match=sentence):
        CapturedGradient(model, config(model, CASES[0]))(batch(), inner_lr=0.5)


@pytest.mark.usefixtures("fake_graphs")
def test_another_rank_may_give_it_up() -> None:
    model, asked = make(torch.float32), []
    gradient = CapturedGradient(model, config(model, CASES[0]), lambda good: bool(asked.append(good)))
    with pytest.warns(GraphRefused, match=r" 0\.00% off; "):
        gradient(batch(), inner_lr=0.5)
    gradient(batch(), inner_lr=0.5)
    assert asked == [True]


@pytest.mark.usefixtures("fake_graphs")
def test_only_one_set_of_gradients_is_there_when_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = make(torch.float32), []
    gradient = CapturedGradient(model, config(model, CASES[0]))
    begin = torch.cuda.CUDAGraph

    def beginning() -> FakeGraph:
        before.append([parameter.grad for parameter in model.parameters()])
        return begin()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", beginning)
    gradient(batch(), inner_lr=0.5)
    assert before == [[None] * len(list(model.parameters()))]
