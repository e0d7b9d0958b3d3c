"""Losses of sequences that are partly or wholly padding: means over what has a target, in every way of computing."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from examples import ttt_e2e_minimal as minimal
from longread.config import OptimizerConfig, RunConfig
from longread.data import Batch
from longread.outer_loop import end_to_end_loss, mean_loss, static_loss
from longread.train import accumulate_gradient
from longread.train.gradient import inner_sums
from tests.test_outer_loop import KINDS, batch, by_hand, gradients, make, same, small

T, M = 28, 4
TARGETS = (28, 9, 0, 1, 13, 4)
"""Of each sequence, counted from its start."""


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Six sequences: a full one, shorter ones, an empty one, and one whose second mini-batch has no target."""
    ids, targets, mask = batch(small(), B=len(TARGETS), T=T)
    mask &= torch.arange(T) < torch.tensor(TARGETS)[:, None]
    mask[:, 0] = torch.tensor(TARGETS) > 0
    mask[4, M : 2 * M] = False
    return ids, targets, mask


def mean_by_hand(nll: Tensor, mask: Tensor) -> float:
    """The definition, number by number."""
    sequences = []
    for row, keep in zip(nll.tolist(), mask.tolist(), strict=True):
        parts = [
            [x for x, kept in zip(row[i : i + M], keep[i : i + M], strict=True) if kept] for i in range(0, len(row), M)
        ]
        means = [sum(part) / len(part) for part in parts if part]
        if means:
            sequences.append(sum(means) / len(means))
    return sum(sequences) / len(sequences)


@cache
def expected_gradients(kind: str) -> dict[str, Tensor]:
    return by_hand(make(small()), padded(), lr=0.7, clip=0.3, **KINDS[kind])


ESSENTIAL = [("step", "cut after 2"), ("step", "first-order")]
"""Beside every kind where nothing runs again, and every schedule of the exact one."""


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        pytest.param(
            schedule,
            kind,
            marks=() if schedule == "none" or kind == "exact" or (schedule, kind) in ESSENTIAL else pytest.mark.slow,
        )
        for schedule, kind in itertools.product(["none", "blocks", "sqrt", "step", "all"], KINDS)
    ],
)
def test_what_has_no_target_is_not_counted(schedule: str, kind: str) -> None:
    model, data = make(small()), padded()
    result = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.3, recompute=schedule, **KINDS[kind])
    assert result.loss.item() == pytest.approx(mean_by_hand(result.nll, data[2]), rel=1e-13)
    same(gradients(model, result.loss), expected_gradients(kind), 1e-10)


@pytest.mark.parametrize("schedule", ["none", "blocks"])
def test_neither_does_the_static_loss(schedule: str) -> None:
    model, data = make(small()), padded()
    result = static_loss(model, *data, recompute=schedule)
    assert result.loss.item() == pytest.approx(mean_by_hand(result.nll, data[2]), rel=1e-13)
    same(gradients(model, result.loss), by_hand(model, data, lr=0.0, clip=None), 1e-10)


def test_a_sequence_and_its_padding_are_the_sequence() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config, B=1, T=12)
    alone = end_to_end_loss(model, ids, targets, mask, inner_lr=0.7, inner_clip=0.3)
    longer = [torch.cat([x, torch.zeros(1, 16, dtype=x.dtype)], dim=1) for x in (ids, targets, mask)]
    with_empty = [torch.cat([x, torch.zeros_like(x)]) for x in longer]
    expected = gradients(model, alone.loss)
    for data in (longer, with_empty):
        found = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.3)
        torch.testing.assert_close(found.loss, alone.loss, rtol=1e-13, atol=0)
        same(gradients(model, found.loss), expected, 1e-12)


def test_where_nothing_is_padded_it_is_the_plain_mean() -> None:
    losses = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(3, T, dtype=torch.bool)
    torch.testing.assert_close(mean_loss(losses, mask), losses.mean(), rtol=1e-14, atol=0)
    assert minimal.mean_loss(losses, mask) == pytest.approx(losses.mean().item(), rel=1e-14)


def run_config(**changes: Any) -> RunConfig:
    fields = {
        "name": "padded",
        "model": small(),
        "optimizer": OptimizerConfig(lr=1e-3),
        "context_length": T,
        "batch_size": len(TARGETS),
        "steps": 1,
        "recompute": "none",
        "precision": "float64",
    }
    return RunConfig(**fields | changes)


def accumulated(config: RunConfig, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model = make(small())
    found = accumulate_gradient(model, config, Batch(*data), inner_lr=0.7)
    return found.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "static"},
        pytest.param({"truncate_after": 2}, marks=pytest.mark.slow),
        pytest.param({"recompute": "sqrt"}, marks=pytest.mark.slow),
        pytest.param({"meta_gradient": "first-order"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_micro_batches_of_uneven_padding_accumulate_to_the_gradient_of_the_batch(options: dict[str, Any]) -> None:
    """Of 1, 2 or 3 sequences, in the order of the batch and in another, in which an empty one fills a micro-batch."""
    for order in ([0, 1, 2, 3, 4, 5], [2, 0, 1, 5, 3, 4]):
        ids, targets, mask = (x[order] for x in padded())
        mask = mask.clone()
        mask[1] &= order[1] == 1  # a second empty sequence in one of the two
        whole, expected = accumulated(run_config(**options), (ids, targets, mask))
        for size in (1, 2, 3):
            loss, found = accumulated(run_config(**options, micro_batch_size=size), (ids, targets, mask))
            torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
            same(found, expected, 1e-12)


@pytest.mark.parametrize("loss", ["end-to-end", "static"])
def test_a_batch_without_a_target_costs_nothing_and_moves_nothing(loss: Any) -> None:
    ids, targets, mask = padded()
    found, gradient = accumulated(run_config(loss=loss, micro_batch_size=2), (ids, targets, mask & False))
    assert found.item() == 0.0
    assert all((g == 0).all() for g in gradient.values())


class NothingWaits(TorchDispatchMode):
    """Refuses what needs a value of the device before the next operation, as a CUDA graph does when it is captured."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("loss", ["end-to-end", "static"])
def test_nothing_of_a_gradient_depends_on_where_the_padding_is(loss: Any) -> None:
    config = dataclasses.replace(run_config(loss=loss), micro_batch_size=2)
    model, rate = make(small()), torch.tensor(0.7, dtype=torch.float64)
    with NothingWaits():
        accumulate_gradient(model, config, Batch(*padded()), inner_lr=rate)
    with NothingWaits(), pytest.raises(AssertionError, match="waits"):
        rate.item()


def test_inner_steps_that_had_nothing_to_learn_are_not_averaged() -> None:
    norms = torch.tensor([[0.5, 0.0, 2.0], [0.0, 0.0, 0.0]])
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [1, 5]] = True  # the last mini-batch takes no step
    mask[1, 7] = True
    assert inner_sums(norms, mask, 1.0).means() == {"inner_grad_norm": 1.25, "inner_clipped": 0.5}
    assert inner_sums(norms, mask, None).means()["inner_clipped"] == 0.0
    assert inner_sums(norms, mask & False, 1.0).means() == {}
