"""What a loss says beside its number: shapes, and that nothing but the loss is differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longread.outer_loop import end_to_end_loss, static_loss
from tests.test_outer_loop import batch, gradients, make, same, small
from tests.test_outer_memory import Operations

SCHEDULES = ["none", "blocks", "sqrt", "step"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_mini_batch_takes_no_step_and_only_the_loss_is_differentiated(schedule: str) -> None:
    model = make(small())
    result = end_to_end_loss(model, *batch(model.config), inner_lr=0.7, inner_clip=0.5, recompute=schedule)
    assert result.inner_grad_norm.shape == (2, 4)
    assert result.mini_batch_loss.shape == (2, 5)
    assert result.nll.shape == (2, 20)
    assert [x.requires_grad for x in result] == [True, False, False, False]


def test_of_the_static_loss_too() -> None:
    model = make(small())
    result = static_loss(model, *batch(model.config))
    assert result.mini_batch_loss.shape == (2, 5)
    assert [x.requires_grad for x in result] == [True, False, False, False]


def test_the_static_loss_attends_by_fused_kernels_in_every_block() -> None:
    """Its gradient is of order 1, also in the blocks that could learn."""
    model = make(small(num_suffix_blocks=4))
    with Operations() as operations:
        static_loss(model, *batch(model.config), recompute="none")
    assert operations.count == 4


def test_no_tokens_are_refused() -> None:
    model = make(small())
    data = batch(model.config, T=0)
    for loss, options in ((static_loss, {}), (end_to_end_loss, {"inner_lr": 1.0, "inner_clip": 1.0})):
        with pytest.raises(ValueError, match="0 tokens are no multiple of the mini-batch of 4"):
            loss(model, *data, **options)


def test_one_token_is_a_sequence_where_a_mini_batch_is_one_token() -> None:
    model = make(small(mini_batch_size=1))
    data = batch(model.config, T=1)
    learning = end_to_end_loss(model, *data, inner_lr=1.0, inner_clip=1.0)
    torch.testing.assert_close(learning.nll, static_loss(model, *data).nll)


@pytest.mark.parametrize("changes", [{"num_suffix_blocks": 3}, {"num_suffix_blocks": 4}], ids=str)
def test_recomputation_carries_every_cache(changes: dict[str, Any]) -> None:
    """With three blocks that learn, two of them bring keys and values from segment to segment."""
    model = make(small(**changes))
    data = batch(model.config, T=28)
    found = {
        schedule: gradients(model, end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, recompute=schedule).loss)
        for schedule in SCHEDULES
    }
    for schedule in SCHEDULES[1:]:
        same(found[schedule], found["none"], 1e-12)
