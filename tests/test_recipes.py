"""Recipes against the paper's Table 3."""

from __future__ import annotations

import pytest

from longread.config import UserError
from longread.recipes import RECIPES, SIZES, extend, narrowed, pretrain, recipe, toy

# size: blocks, dim, heads, suffix, F, batch (tokens), lr, tokens, extension batch, extension tokens
TABLE_3 = {
    "125m": (12, 768, 12, 3, 1664, 0.5e6, 3e-3, 2.5e9, 1e6, 125e6),
    "350m": (24, 1024, 16, 6, 2304, 0.5e6, 1.5e-3, 7e9, 1e6, 350e6),
    "760m": (24, 1536, 16, 6, 3328, 0.5e6, 1.25e-3, 15e9, 1e6, 750e6),
    "1.3b": (24, 2048, 32, 6, 4352, 0.5e6, 1e-3, 26e9, 1e6, 1.3e9),
    "3b": (32, 2560, 32, 8, 5632, 1e6, 8e-4, 54e9, 2e6, 2.7e9),
}
NAMED_SIZE = {"125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9, "3b": 2.7e9}


@pytest.mark.parametrize("size", TABLE_3)
def test_table_3(size: str) -> None:
    blocks, dim, heads, suffix, F, batch, lr, tokens, extension_batch, extension_tokens = TABLE_3[size]
    run, longer = pretrain(size), extend(size, context_length=32768)
    for config in (run.model, longer.model):
        assert (config.num_blocks, config.width, config.num_heads) == (blocks, dim, heads)
        assert (config.num_suffix_blocks, config.mlp_hidden) == (suffix, F)
        assert (config.window_size, config.mini_batch_size, config.rope_base) == (8192, 1024, 5e5)
    assert run.optimizer.lr == lr
    assert longer.optimizer.lr == 4e-4
    for config, per_step, total in ((run, batch, tokens), (longer, extension_batch, extension_tokens)):
        assert config.batch_size * config.context_length == pytest.approx(per_step, rel=0.05)
        assert config.batch_size * config.context_length * config.steps == pytest.approx(total, rel=0.05)
        assert config.optimizer.warmup_steps == pytest.approx(0.1 * config.steps, abs=1)
        assert (config.optimizer.end_lr, config.optimizer.decay_steps) == (1e-5, config.steps)
    assert run.inner.lr_at(0) == pytest.approx(0.1, abs=0.01)
    assert run.inner.lr_at(run.steps // 10) == 1.0
    assert longer.inner.lr_at(0) == 1.0


@pytest.mark.parametrize("size", TABLE_3)
def test_methods_have_equal_parameters(size: str) -> None:
    counts = {method: recipe(size, method).model.num_parameters for method in ("e2e", "naive", "swa", "full", "hybrid")}
    assert max(counts.values()) / min(counts.values()) < 1.02
    without_embedding = counts["e2e"] - pretrain(size).model.vocab_size * pretrain(size).model.width
    assert 0.6 < without_embedding / NAMED_SIZE[size] < 1.1


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_papers_own_schedule_begins_with_a_step_of_rate_zero(name: str) -> None:
    optimizer = recipe(name).optimizer
    if name in ("toy", "small", "small-extend"):
        assert optimizer.lr_at(0) == pytest.approx(optimizer.lr / optimizer.warmup_steps)
        assert optimizer.lr_at(0) < optimizer.lr_at(1) < optimizer.lr_at(optimizer.warmup_steps) == optimizer.lr
    else:
        assert optimizer.lr_at(0) == 0.0


def test_other_steps_scale_the_schedules() -> None:
    """By the dial as by the function; what a size of its own says of its steps is the same."""
    short = recipe("toy", steps=40)
    assert (short.steps, short.optimizer.decay_steps) == (40, 40)
    assert (short.optimizer.warmup_steps, short.inner.warmup_steps) == (4, 4)
    assert short.optimizer.initial_lr == pytest.approx(toy(steps=40).optimizer.initial_lr, rel=1e-12)
    short_125m = recipe("125m", steps=100)
    assert (short_125m.optimizer.warmup_steps, short_125m.inner.warmup_steps) == (10, 10)
    assert short_125m.optimizer.initial_lr == 0.0
    assert recipe("small-extend", steps=20).inner.warmup_steps == 0
    assert recipe("toy", steps=1).optimizer.decay_steps == 1
    assert recipe("toy", steps=250) == recipe("toy")


def test_the_other_dials() -> None:
    config = recipe("toy", lr=6e-3, batch_size=2)
    assert config.batch_size == 2
    assert config.optimizer.lr == 6e-3
    assert config.optimizer.initial_lr == pytest.approx(2 * recipe("toy").optimizer.initial_lr)


def test_narrowed() -> None:
    bases = {size: row.mlp_hidden for size, row in SIZES.items()}
    assert [narrowed(bases[s], SIZES[s].num_blocks, SIZES[s].num_blocks // 4) for s in SIZES] == [
        1664,
        2304,
        3328,
        4352,
        5632,
    ]


@pytest.mark.parametrize(("context", "base"), [(8192, 5e5), (16384, 1e6), (32768, 2e6), (65536, 5e6), (131072, 1e7)])
def test_full_attention_widens_its_rotary_base(context: int, base: float) -> None:
    assert extend("125m", "full", context_length=context).model.rope_base == base
    assert extend("125m", "swa", context_length=context).model.rope_base == 5e5


def test_what_the_methods_are() -> None:
    runs = {method: toy(method) for method in ("e2e", "naive", "swa", "full", "hybrid")}
    assert [run.loss for run in runs.values()] == ["end-to-end", "static", "static", "static", "static"]
    assert [run.model.num_suffix_blocks for run in runs.values()] == [1, 1, 0, 0, 0]
    assert [run.model.window_of(3) for run in runs.values()] == [128, 128, 128, None, None]
    hybrid = pretrain("125m", "hybrid").model
    assert [hybrid.window_of(i) is None for i in range(12)] == [i in (5, 11) for i in range(12)]
    counts = {run.model.num_parameters for run in runs.values()}
    assert max(counts) / min(counts) < 1.001


def test_every_recipe_can_be_made() -> None:
    for name in RECIPES:
        assert recipe(name, vocab_size=300, seed=7).model.vocab_size == 300
        assert recipe(name).seed == 0
    assert recipe("toy", context_length=64).context_length == 64
    assert recipe("125m", context_length=8192) == recipe("125m")
    assert recipe("3b-extend", context_length=16384).batch_size == 128


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "7b"}, "no recipe '7b'; choose one of toy, small, small-extend, 125m"),
        ({"name": "toy", "method": "mamba"}, "no method 'mamba'; choose one of e2e"),
        ({"name": "125m", "context_length": 16384}, "pre-training is at 8192 tokens; for 16384 use 125m-extend"),
        ({"name": "125m-extend", "context_length": 10000}, "10000 does not divide the batch of 1048576"),
        ({"name": "125m-extend", "method": "full", "context_length": 262144}, "rotary base for 8192"),
        (
            {"name": "toy", "context_length": 1000},
            "1000 is not a multiple of model.mini_batch_size 32; use 992 or 1024",
        ),
    ],
)
def test_what_cannot_be_made(arguments: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        recipe(**arguments)
