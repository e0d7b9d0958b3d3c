"""An inner loss that weighs targets by what they cost (`InnerConfig.surprise`): one definition, wherever it is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig, OptimizerConfig, RunConfig, UserError
from longread.data import Batch
from longread.inner_loop import Carry, begin, captured, read
from longread.inner_loop.step import from_matrices, matrices, mini_batch_loss, surprise_weights
from longread.model import Transformer
from longread.outer_loop import end_to_end_loss
from longread.session import Session
from longread.train import accumulate_gradient
from longread.transformers.training import Aligned, outer_loss
from tests import tiny
from tests.fake_graphs import FakeGraph, fake_graphs, set_capturing  # noqa: F401
from tests.tiny import M, make, text

LR, CLIP, ALPHA = 0.7, 0.5, 1.5
INNER = InnerConfig(lr=LR, clip=CLIP, surprise=ALPHA)
SETTINGS = {"inner_lr": LR, "inner_clip": CLIP, "inner_surprise": ALPHA}


def wide(**changes: object) -> Transformer:
    model = make(3, torch.float64, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    return model


def batch(T: int = 4 * M, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(19, (B, T + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.rand(B, T, generator=generator) > 0.2


def gradients(model: Transformer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def by_hand(
    model: Transformer,
    data: tuple[Tensor, Tensor, Tensor],
    *,
    order: int = 2,
    held: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The outer loss, without weights, and the weights of each inner loss; `held`: weights to take instead."""
    ids, targets, mask = data
    B, T = ids.shape
    lower, upper = model.empty_pasts(B)
    hidden, _ = model.lower(ids, lower, start=0)
    carry, losses, used = Carry(model.initial_fast_weights(B), upper), [], []
    for i in range(T // M):
        part = slice(i * M, (i + 1) * M)
        output, own = model.upper(hidden[:, part], carry.fast, carry.pasts, start=i * M, order=2)
        nll, counts = model.token_losses(output, targets[:, part]), mask[:, part].double()
        losses.append((nll * counts).sum(1) / counts.sum(1))
        power = nll.detach() ** ALPHA * counts
        used.append(power / power.sum(1, keepdim=True) if held is None else held[i])
        flat = matrices(carry.fast)
        found = torch.autograd.grad((used[-1] * nll).sum(), flat, create_graph=True)
        found = [g if order == 2 else g.detach() for g in found]
        norm = torch.stack([g.square().sum((1, 2)) for g in found]).sum(0).sqrt().view(-1, 1, 1)
        moved = [w - LR * (CLIP / norm).clamp(max=1) * g for w, g in zip(flat, found, strict=True)]
        carry = Carry(from_matrices(moved), model.advance(carry.pasts, own, model.num_lower_attentions))
    return torch.stack(losses, 1).mean(), used


@pytest.mark.parametrize("recompute", ["none", "step"])
@pytest.mark.parametrize("kind", ["exact", "first-order"])
def test_the_meta_gradient_is_that_of_an_unroll_with_constant_weights(kind: str, recompute: str) -> None:
    model, data = wide(), batch()
    found = end_to_end_loss(model, *data, **SETTINGS, meta_gradient=kind, recompute=recompute)
    expected, _ = by_hand(model, data, order=2 if kind == "exact" else 1)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    for made, wanted in zip(gradients(model, found.loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-8, atol=1e-11)


def test_the_meta_gradient_is_that_of_finite_differences_at_the_same_weights() -> None:
    model, data = wide(), batch()
    exact = gradients(model, end_to_end_loss(model, *data, **SETTINGS).loss)
    _, held = by_hand(model, data)
    generator, h = torch.Generator().manual_seed(0), 1e-3
    parameters = [p.data for p in model.parameters()]
    middle = [p.clone() for p in parameters]
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    length = torch.stack([d.norm() for d in directions]).norm()
    values = []
    for shift in (-2, -1, 1, 2):
        for p, at, d in zip(parameters, middle, directions, strict=True):
            p.copy_(at + shift * h / length * d)
        values.append(by_hand(model, data, held=held)[0].item())
    numeric = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    analytic = sum((g * d).sum() for g, d in zip(exact, directions, strict=True)) / length
    assert analytic.item() == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def test_without_an_exponent_every_bit_stays() -> None:
    model, data = wide(), batch()
    plain = end_to_end_loss(model, *data, inner_lr=LR, inner_clip=CLIP)
    zero = end_to_end_loss(model, *data, inner_lr=LR, inner_clip=CLIP, inner_surprise=0.0)
    weighted = end_to_end_loss(model, *data, **SETTINGS)
    assert torch.equal(plain.nll, zero.nll)
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(model, plain.loss), gradients(model, zero.loss), strict=True)
    )
    assert torch.equal(plain.nll[:, :M], weighted.nll[:, :M])
    assert (plain.nll[:, M:] - weighted.nll[:, M:]).abs().max() > 1e-3


def test_weights_are_powers_of_the_loss_with_a_mean_of_1_over_what_counts() -> None:
    nll = torch.tensor([[1.0, 4.0, 9.0, 100.0], [0.0, 0.0, -1e-7, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]] * 2)
    weights = surprise_weights(nll, mask, 0.5)
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 1.0, 1.5, 0.0]))
    assert not weights.requires_grad
    assert torch.equal(weights[1], torch.zeros(4))
    none = surprise_weights(nll, torch.zeros_like(mask), 2.0)
    assert torch.equal(none, torch.zeros(2, 4))
    torch.testing.assert_close(mini_batch_loss(weights, mask), torch.tensor([1.0, 0.0]))
    for unit in (1e-30, 1e30):  # what is compared are targets: no power of a loss is too large or too small
        torch.testing.assert_close(surprise_weights(unit * nll[:1], mask[:1], 0.5), weights[:1])
    torch.testing.assert_close(surprise_weights(nll[:1], mask[:1], 60.0), torch.tensor([[0.0, 0.0, 3.0, 0.0]]))


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("pieces", [[45], [1] * 45, [7, 33, 5]], ids=["at once", "token by token", "pieces"])
def test_reading_is_one_computation_with_training_in_any_pieces_and_by_graphs(
    pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "STRETCH", 8)
    monkeypatch.setattr(captured, "WORTH", 1)
    replays: list[FakeGraph] = []
    replay = FakeGraph.replay
    monkeypatch.setattr(FakeGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    model, tokens = wide(), torch.tensor([text(45, seed) for seed in range(2)])
    mask = torch.ones(2, 44, dtype=torch.bool)
    trained = end_to_end_loss(model, tokens[:, :-1], tokens[:, 1:], mask, **SETTINGS)
    for graphs in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not graphs:
                set_capturing(patch, on=False)
            state, nll, norms = begin(model, 2), [], []
            for part in tokens.split(pieces, 1):
                found = read(model, state, part, inner=INNER)
                state = found.state
                nll.append(found.nll)
                norms.append(found.inner_grad_norm)
        torch.testing.assert_close(torch.cat(nll, 1)[:, 1:], trained.nll, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.cat(norms, 1)[:, :10], trained.inner_grad_norm, rtol=1e-9, atol=1e-11)
        assert replays


def test_what_follows_changes_nothing_before() -> None:
    model, tokens = wide(), torch.tensor([text(6 * M + 1)])
    before = read(model, begin(model), tokens, inner=INNER).nll
    for changed in (M, 2 * M + 1, 5 * M - 1, 6 * M):
        other = tokens.clone()
        other[:, changed:] = (other[:, changed:] + 7) % 19
        after = read(model, begin(model), other, inner=INNER).nll
        assert torch.equal(after[:, 1:changed], before[:, 1:changed])
        assert not torch.equal(after[:, changed], before[:, changed])


def test_a_session_writes_and_is_saved_with_it(tmp_path: Path) -> None:
    model = make(3, torch.float64)
    session = Session(model, INNER)
    session.read(text(3 * M + 2))
    session.save(tmp_path / "s")
    restored = Session.restore(tmp_path / "s", model)
    assert restored.inner == INNER
    written = [list(one.generate(max_tokens=2 * M, temperature=0)) for one in (session, restored)]
    assert written[0] == written[1]
    whole = Session(model, INNER)
    whole.read(text(3 * M + 2) + [int(token) for token in written[0]])
    for a, b in zip(matrices(whole.state.fast), matrices(session.state.fast), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_config_names_it_only_where_it_is_set_and_every_training_takes_it() -> None:
    assert "surprise" not in InnerConfig().as_dict()
    assert InnerConfig.from_dict(INNER.as_dict()) == INNER
    with pytest.raises(UserError, match=r"inner\.surprise is -1; it must be at least 0"):
        InnerConfig(surprise=-1)
    model, (ids, targets, mask) = make(3, torch.float64), batch()
    expected = end_to_end_loss(model, ids, targets, mask, **SETTINGS).loss
    config = RunConfig(
        name="tiny",
        model=tiny.config(),
        optimizer=OptimizerConfig(lr=1e-3),
        inner=INNER,
        context_length=4 * M,
        batch_size=2,
        steps=1,
        precision="float64",
    )
    trained = accumulate_gradient(model, config, Batch(ids, targets, mask), inner_lr=LR)
    torch.testing.assert_close(trained.loss, expected)
    rows = Aligned(ids, targets, mask, mask)
    made = outer_loss(model, INNER, rows, learn=True, rate=LR, recompute="none", outputs=False).loss
    torch.testing.assert_close(made, expected)
    plain = dataclasses.replace(INNER, surprise=0.0)
    assert outer_loss(model, plain, rows, learn=True, rate=LR, recompute="none", outputs=False).loss != expected
