"""One step and the scan against autograd written out: what each order differentiates, and what it leaves."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from longread.inner_loop.optimizers import InnerOptimizer
from longread.inner_loop.step import (
    Carry,
    from_matrices,
    inner_gradient,
    inner_step,
    matrices,
    mini_batch_loss,
    scan,
    step_norm_limit,
)
from longread.model import Transformer
from longread.ops.clipped_sgd import clipped_sgd
from tests.tiny import M, make

LR = 0.3


def exact(**changes: object) -> Transformer:
    return make(3, torch.float64, **changes)


def inputs(model: Transformer, count: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that are given, targets, and a mask that leaves out some."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(B, count * M, 16, generator=generator, dtype=model.dtype)
    targets = torch.randint(19, (B, count * M), generator=generator)
    return hidden, targets, torch.rand(B, count * M, generator=generator) > 0.2


def carry_of(model: Transformer, B: int = 2) -> Carry:
    return Carry(model.initial_fast_weights(B), model.empty_pasts(B)[1])


def by_hand(model: Transformer, count: int, order: int) -> Tensor:
    """The losses of mini-batches of which each has moved the weights: plain steps without clipping, [B, count]."""
    carry, losses = carry_of(model), []
    for i, (hidden, targets, mask) in enumerate(zip(*(x.split(M, dim=1) for x in inputs(model, count)), strict=True)):
        output, own = model.upper(hidden, carry.fast, carry.pasts, start=i * M, order=2)
        nll = model.token_losses(output, targets)
        losses.append((nll * mask).sum(-1) / mask.sum(-1))
        weights = matrices(carry.fast)
        gradients = torch.autograd.grad(losses[-1].sum(), weights, create_graph=True)
        moved = [w - LR * (g if order == 2 else g.detach()) for w, g in zip(weights, gradients, strict=True)]
        carry = Carry(from_matrices(moved), model.advance(carry.pasts, own, model.num_lower_attentions))
    return torch.stack(losses, dim=1)


@pytest.mark.parametrize("last_step", [True, False])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_scan_is_this_and_so_is_its_gradient(order: int, last_step: bool) -> None:
    """Order 2 goes through every step, order 1 through none of them, and at order 0 nothing can be differentiated."""
    model = exact()
    found = scan(model, carry_of(model), *inputs(model, 3), start=0, lr=LR, clip=None, order=order, last_step=last_step)
    expected = by_hand(model, 3, order)
    torch.testing.assert_close(found.mini_batch_loss, expected, rtol=1e-10, atol=1e-12)
    assert found.grad_norm.shape == (2, 3 if last_step else 2)
    own = mini_batch_loss(found.nll.view(2, 3, M), inputs(model, 3)[2].view(2, 3, M))
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
    if not order:
        assert not any(x.requires_grad for x in (found.grad_norm, *matrices(found.carry.fast)))
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    made, wanted = (
        torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
        for losses in (found.mini_batch_loss, expected)
    )
    assert max(g.abs().max().item() for g in wanted) > 0.01
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_unless_told_otherwise_every_mini_batch_is_learned_from() -> None:
    model = exact()
    assert inspect.signature(scan).parameters["last_step"].default is True
    alone = scan(model, carry_of(model), *inputs(model, 1), start=0, lr=LR, clip=None, order=0, last_step=False)
    assert alone.grad_norm.shape == (2, 0)


def test_each_sequence_has_its_own_step() -> None:
    """Whatever is beside it: the gradient of a sum, not of a mean."""
    model = exact()
    hidden, targets, mask = inputs(model, 1, B=3)
    both = inner_step(model, carry_of(model, 3), hidden, targets, mask, start=0, lr=LR, clip=None, order=0)
    for b in range(3):
        here = slice(b, b + 1)
        alone = inner_step(
            model, carry_of(model, 1), hidden[here], targets[here], mask[here], start=0, lr=LR, clip=None, order=0
        )
        for x, y in zip(matrices(both.fast), matrices(alone.fast), strict=True):
            torch.testing.assert_close(x[here], y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(both.grad_norm[here], alone.grad_norm, rtol=1e-10, atol=1e-12)


def test_a_step_at_order_0_keeps_no_graph_and_leaves_the_weights_as_they_were() -> None:
    """Also where gradients are on, and where the weights are parameters."""
    model = exact()
    plain = Carry(from_matrices([w.detach().clone() for w in matrices(carry_of(model).fast)]), model.empty_pasts(2)[1])
    for carry in (carry_of(model), plain):
        step = inner_step(model, carry, *inputs(model, 1), start=0, lr=LR, clip=0.5, order=0)
        pasts = [x for past in step.own for x in past]
        kept = (*matrices(step.fast), *pasts, step.nll, step.loss, step.grad_norm, step.output)
        assert not any(x.requires_grad for x in kept)
    assert not any(w.requires_grad for w in matrices(plain.fast))


@pytest.mark.parametrize("order", [1, 2])
def test_weights_that_need_no_gradient_can_be_stepped_at_any_order(order: int) -> None:
    model = exact()
    fast = from_matrices([w.detach() for w in matrices(carry_of(model).fast)])
    carry = Carry(fast, model.empty_pasts(2)[1])
    step = inner_step(model, carry, *inputs(model, 1), start=0, lr=LR, clip=None, order=order)
    expected = inner_step(model, carry_of(model), *inputs(model, 1), start=0, lr=LR, clip=None, order=order)
    for x, y in zip(matrices(step.fast), matrices(expected.fast), strict=True):
        assert torch.equal(x, y)
    assert not any(w.requires_grad for w in matrices(fast))


def test_at_order_0_the_gradient_has_no_graph() -> None:
    model = exact()
    weights = [w.detach().requires_grad_() for w in matrices(carry_of(model).fast)]
    found = inner_gradient(model, weights, model.empty_pasts(2)[1], *inputs(model, 1), start=0, order=0)
    own = [x for past in found.own for x in past]
    assert not any(x.requires_grad for x in (*found.gradients, *own, found.nll, found.loss, found.output))


def test_a_step_can_be_limited_and_be_another_rule_s() -> None:
    """Refused where it is longer than the limit; `scan` takes the rule that it is given."""
    model = exact()
    before = matrices(carry_of(model).fast)
    for max_step_norm, moved in ((1e-6, False), (1e6, True)):
        step = inner_step(
            model,
            carry_of(model),
            *inputs(model, 1),
            start=0,
            lr=LR,
            clip=None,
            order=0,
            max_step_norm=torch.tensor(max_step_norm, dtype=torch.float64),
        )
        assert all(torch.equal(a, b) for a, b in zip(matrices(step.fast), before, strict=True)) is not moved

    def none(weights, gradients, *, lr, clip):  # type: ignore[no-untyped-def]
        return [w + lr * 0 for w in weights]

    found = scan(
        model,
        carry_of(model),
        *inputs(model, 2),
        start=0,
        lr=LR,
        clip=None,
        order=1,
        optimizer=InnerOptimizer(none),
    )
    for a, b in zip(matrices(found.carry.fast), before, strict=True):
        assert torch.equal(a, b)


def test_the_loss_of_a_mini_batch() -> None:
    nll = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, True], [False, True, True], [False] * 3])
    assert mini_batch_loss(nll, mask).tolist() == [3.0, 4.0, 0.0]


def test_a_step_may_be_as_long_as_the_weights() -> None:
    """In float32 at least, as fast weights are."""
    model = make(width=64, mlp_hidden=96).bfloat16()
    weights = [w.double() for w in matrices(model.initial_fast_weights(1))]
    expected = math.sqrt(sum(w.square().sum().item() for w in weights))
    found = step_norm_limit(model)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert step_norm_limit(exact()).dtype == torch.float64


def test_weights_of_zero_limit_no_step_but_endless_ones() -> None:
    model = make().requires_grad_(False)
    for w in matrices(model.initial_fast_weights(1)):
        w.zero_()
    limit = step_norm_limit(model)
    assert limit.item() == torch.finfo(torch.float32).max
    gradient = torch.tensor([[3.0, 4.0], [3e37, 4e37], [math.inf, 1.0]]) * 1e-18
    gradient[1] *= 1e18
    (new,), _ = clipped_sgd([torch.zeros(3, 2)], [gradient], lr=100.0, clip=None, max_step_norm=limit)
    assert torch.equal(new[0], -100 * gradient[0])
    assert not new[1:].any()
    model.blocks[-1].fast_mlp.up.weight.fill_(0.5)  # type: ignore[union-attr]
    assert step_norm_limit(model).item() == pytest.approx(0.5 * math.sqrt(16 * model.config.mlp_hidden))
