"""Schedules in numbers, worked out by hand, and messages that name a field as `--set` takes it."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from longread.config import InnerConfig, OptimizerConfig, RunConfig, UserError
from longread.recipes import recipe

ROOT_HALF = math.sqrt(0.5)


def test_the_outer_rate_climbs_in_equal_parts_and_falls_along_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, initial_lr=0.2, end_lr=0.1, warmup_steps=4, decay_steps=12)
    climb = [0.2, 0.4, 0.6, 0.8]
    fall = {4: 1.0, 6: 0.55 + 0.45 * ROOT_HALF, 8: 0.55, 10: 0.55 - 0.45 * ROOT_HALF, 12: 0.1, 13: 0.1, 500: 0.1}
    assert [config.lr_at(step) for step in range(4)] == pytest.approx(climb, rel=1e-12)
    assert [config.lr_at(step) for step in fall] == pytest.approx(list(fall.values()), rel=1e-12)


def test_the_outer_rate_without_a_warm_up() -> None:
    config = OptimizerConfig(lr=2.0, initial_lr=5.0, end_lr=0.0, decay_steps=3)
    assert [config.lr_at(step) for step in range(5)] == pytest.approx([2.0, 1.5, 0.5, 0.0, 0.0], abs=1e-12)


def test_a_warm_up_that_lasts_as_long_as_the_decay_ends_at_the_highest_rate() -> None:
    config = OptimizerConfig(lr=1.0, end_lr=0.25, warmup_steps=2, decay_steps=2)
    assert [config.lr_at(step) for step in range(4)] == pytest.approx([0.0, 0.5, 1.0, 0.25])


def test_the_inner_rate_climbs_from_its_first_step() -> None:
    config = InnerConfig(lr=2.0, warmup_from=0.4, warmup_steps=4)
    assert [config.lr_at(step) for step in range(6)] == pytest.approx([0.8, 1.2, 1.6, 2.0, 2.0, 2.0], rel=1e-12)
    assert InnerConfig(lr=0.7).lr_at(0) == 0.7
    assert InnerConfig(lr=0.0, warmup_from=0.1, warmup_steps=2).lr_at(0) == pytest.approx(0.05)


def changed_in(config: RunConfig, path: str, value: Any) -> RunConfig:
    part, _, name = path.rpartition(".")
    if part:
        name, value = part, dataclasses.replace(getattr(config, part), **{name: value})
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("seed", -1, "seed is -1; it must be at least 0"),
        ("max_bad_steps", 0, "max_bad_steps is 0; it must be at least 1"),
        ("loss", "mean", "loss is 'mean'; it must be one of end-to-end, static"),
        ("optimizer.lr", 0.0, "optimizer.lr is 0.0; it must be positive"),
        ("optimizer.lr", math.inf, "optimizer.lr is inf; it must be a finite number"),
        ("optimizer.eps", 0.0, "optimizer.eps is 0.0; it must be positive"),
        ("optimizer.beta1", 1.0, "optimizer.beta1 is 1.0; it must lie in [0, 1)"),
        ("optimizer.clip", 0.0, "optimizer.clip is 0.0; it must be positive, or none to switch clipping off"),
        ("optimizer.end_lr", -1.0, "optimizer.end_lr is -1.0; it must be at least 0"),
        ("optimizer.warmup_steps", 251, "optimizer.warmup_steps is 251; it cannot exceed optimizer.decay_steps, 250"),
        ("inner.clip", -1.0, "inner.clip is -1.0; it must be positive, or none to switch clipping off"),
        ("inner.warmup_from", -1.0, "inner.warmup_from is -1.0; it must be at least 0"),
        ("inner.optimizer", "adam", "inner.optimizer is 'adam'; it must be one of "),
        ("model.width", 127, "model.width 127 does not divide into model.num_heads, 4; choose a multiple"),
        ("model.num_heads", 128, "model.width / model.num_heads is 1; it must be even, as rotary embedding needs it"),
        ("model.num_suffix_blocks", 5, "model.num_suffix_blocks is 5; there are only 4 blocks"),
        ("model.rope_base", 1.0, "model.rope_base is 1.0; it must be above 1"),
        ("model.norm_eps", 0.0, "model.norm_eps is 0.0; it must be positive"),
        ("model.init_std", 0.0, "model.init_std is 0.0; it must be positive"),
        ("model.mixer", "rnn", "model.mixer is 'rnn'; it must be one of attention, mamba2"),
        ("model.mixer", "mamba2", "model.mixer mamba2 has no fast MLPs; set model.num_suffix_blocks to 0 instead of 1"),
        ("model.mini_batch_size", 48, "context_length 1024 is not a multiple of model.mini_batch_size 48; use 1008 or"),
    ],
)
def test_a_message_names_the_field_as_it_is_set(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        changed_in(recipe("toy"), path, value)
