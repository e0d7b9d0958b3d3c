"""What a loss says beside its number: shapes, and that nothing but the loss is differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longread.inner_loop import mini_batch_loss
from longread.outer_loop import end_to_end_loss, mean_loss, static_loss
from tests.test_outer_loop import batch, gradients, make, same, small
from tests.test_outer_memory import Operations
from tests.tiny import M

SCHEDULES = ["none", "blocks", "sqrt", "step", "all"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_mini_batch_takes_no_step_and_only_the_loss_is_differentiated(schedule: str) -> None:
    model = make(small())
    result = end_to_end_loss(model, *batch(model.config), inner_lr=0.7, inner_clip=0.5, recompute=schedule)
    assert result.inner_grad_norm.shape == (2, 4)
    assert result.mini_batch_loss.shape == (2, 5)
    assert result.nll.shape == (2, 20)
    assert [x.requires_grad for x in result[:4]] == [True, False, False, False]


def test_of_the_static_loss_too() -> None:
    model = make(small())
    result = static_loss(model, *batch(model.config))
    assert result.mini_batch_loss.shape == (2, 5)
    assert [x.requires_grad for x in result[:4]] == [True, False, False, False]


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


@pytest.mark.parametrize(
    "changes", [{"num_suffix_blocks": 3}, pytest.param({"num_suffix_blocks": 4}, marks=pytest.mark.slow)], ids=str
)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_outputs_are_what_the_losses_are_made_of(schedule: Any) -> None:
    """Also their gradients, where nothing runs again; and where nobody asks for them, they are not kept."""
    model = make(small())
    tokens, targets, mask = batch(model.config, T=5 * M)
    options = {"inner_lr": 0.7, "inner_clip": 0.5, "recompute": schedule}
    found = end_to_end_loss(model, tokens, targets, mask, outputs=True, **options)
    assert found.output is not None
    nll = model.token_losses(found.output, targets)
    torch.testing.assert_close(nll, found.nll, rtol=1e-10, atol=1e-10)
    expected = end_to_end_loss(model, tokens, targets, mask, **options)
    assert expected.output is None
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)
    wanted = gradients(model, expected.loss)
    same(gradients(model, found.loss) if schedule in ("none", "blocks") else wanted, wanted, 1e-12)
    if schedule in ("none", "blocks"):
        again = end_to_end_loss(model, tokens, targets, mask, outputs=True, **options)
        nll = model.token_losses(again.output, targets)  # type: ignore[arg-type]
        losses = mini_batch_loss(nll.unflatten(1, (-1, M)), mask.unflatten(1, (-1, M)))
        same(gradients(model, mean_loss(losses, mask)), wanted, 1e-9)
    static = static_loss(model, tokens, targets, mask, recompute=schedule, outputs=True)
    torch.testing.assert_close(model.token_losses(static.output, targets), static.nll, rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]
    assert static_loss(model, tokens, targets, mask).output is None


@pytest.mark.parametrize("schedule", ["none", "sqrt", "step", "all"])
def test_what_is_learned_from_need_not_be_what_is_scored(schedule: Any) -> None:
    """The loss of answers by one that learns from questions too: losses of reading everything, over the answers."""
    model = make(small())
    tokens, targets, answers = batch(model.config, T=5 * M)
    read = torch.ones_like(answers)
    read[1, -3:] = False
    options = {"inner_lr": 0.7, "inner_clip": 0.5, "recompute": schedule}
    found = end_to_end_loss(model, tokens, targets, answers & read, inner_mask=read, **options)
    whole = end_to_end_loss(model, tokens, targets, read, outputs=True, **(options | {"recompute": "none"}))
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-10, atol=1e-10)
    counts = (answers & read).unflatten(1, (-1, M))
    nll = model.token_losses(whole.output, targets).unflatten(1, (-1, M))  # type: ignore[arg-type]
    losses = mini_batch_loss(nll, counts)
    torch.testing.assert_close(found.mini_batch_loss, losses, rtol=1e-10, atol=1e-10)
    same(gradients(model, found.loss), gradients(model, mean_loss(losses, answers & read)), 1e-9)
    other = end_to_end_loss(model, tokens, targets, answers & read, **options)
    assert (other.nll - found.nll).abs().max() > 1e-3
