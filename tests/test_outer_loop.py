"""Meta-gradients as numbers: against a hand-written unroll, finite differences, and each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import ttt_e2e_minimal as minimal
from longread.config import ModelConfig, RopeScaling
from longread.inner_loop.step import Scan, scan
from longread.model import Transformer, initialize
from longread.model.layers import JoinedSwiGLU, SwiGLU
from longread.outer_loop import (
    end_to_end_loss,
    static_loss,
)
from tests import tiny

CPU = torch.device("cpu")


def small(**changes: object) -> ModelConfig:
    return tiny.config(**{"rope_base": 100.0} | changes)


def make(config: ModelConfig, seed: int = 0) -> Transformer:
    """A float64 model away from its initial point, where gains are not 1 and steps are large."""
    model = Transformer(config).double()
    initialize(model, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch(config: ModelConfig, B: int = 2, T: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.2
    return tokens[:, :-1], tokens[:, 1:], mask


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


VARIANTS = {
    "one fast block": {"num_suffix_blocks": 1},
    "two fast blocks": {},
    "all blocks fast": {"num_suffix_blocks": 4},
    "window below the mini-batch": {"window_size": 3},
    "window beyond the context": {"window_size": 64},
    "full attention": {"attention": "full"},
    "hybrid attention": {"attention": "hybrid", "num_blocks": 7, "num_suffix_blocks": 2},
    "untied head": {"tie_embeddings": False},
    "grouped heads": {"num_heads": 4, "kv_heads": 2},
    "one head of keys, wider heads": {"kv_heads": 1, "head_size": 12},
    "biases": {"qkv_bias": True, "qk_norm": False, "post_norm": False},
    "fast width and norms": {"fast_hidden": 10, "fast_post_norm": False},
    "windows by block": {"block_windows": (0, 3, 9, 2), "window_size": 8},
    "full attention with windows by block": {"block_windows": (0, 3, 0, 2), "attention": "full"},
    "rotary by block": {"block_rope": ("none", "local", "global", "local"), "local_rope_base": 30.0},
    "rotary, linear": {"rope_scaling": RopeScaling(kind="linear", factor=4)},
    "rotary, llama3": {"rope_scaling": RopeScaling(kind="llama3", factor=8, original_context=24), "head_size": 16},
    "rotary, yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4, original_context=512), "head_size": 16},
    "gelu gate": {"gate": "gelu_tanh"},
    "embedding scale": {"embedding_scale": 4.0},
    "soft caps": {"attention_soft_cap": 0.7, "logit_soft_cap": 1.5},
    "no norms": {"pre_norm": False, "post_norm": False, "qk_norm": False, "init_std": 0.1},
}


@pytest.mark.parametrize(
    ("variant", "clip"),
    [
        pytest.param(variant, clip, marks=() if clip == 0.3 or variant == "two fast blocks" else pytest.mark.slow)
        for variant, clip in itertools.product(VARIANTS, [None, 0.3, 3.0])
    ],
)
def test_the_meta_gradient_is_that_of_a_hand_written_unroll(variant: str, clip: float | None) -> None:
    model = make(small(**VARIANTS[variant]))
    ids, targets, mask = batch(model.config)
    losses, _ = minimal.end_to_end_losses(
        dict(model.named_parameters()), model.config, ids, targets, mask, lr=0.7, clip=clip
    )
    result = end_to_end_loss(model, ids, targets, mask, inner_lr=0.7, inner_clip=clip, recompute="none")
    torch.testing.assert_close(result.mini_batch_loss, losses.detach(), rtol=1e-10, atol=1e-12)
    same(gradients(model, result.loss), gradients(model, losses.mean()), 1e-10)


@pytest.mark.parametrize("together", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_the_meta_gradient_is_that_of_finite_differences(together: int) -> None:
    """Along a random direction for so many kinds of parameters, all blocks at once: four-point central differences."""
    model = make(small())
    data = batch(model.config)
    settings = {"inner_lr": 0.7, "inner_clip": 0.5}
    exact = gradients(model, end_to_end_loss(model, *data, **settings).loss)
    kinds: dict[str, list[str]] = {}
    for name in exact:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    h, generator = 1e-3, torch.Generator().manual_seed(0)
    for start in range(0, len(kinds), together):
        chosen = list(kinds)[start : start + together]
        names = [name for kind in chosen for name in kinds[kind]]
        directions = [torch.randn(exact[n].shape, generator=generator, dtype=torch.float64) for n in names]
        length = torch.stack([d.norm() for d in directions]).norm()
        parameters = [model.get_parameter(n).data for n in names]
        middle = [p.clone() for p in parameters]
        values = []
        for shift in (-2, -1, 1, 2):
            for p, at, d in zip(parameters, middle, directions, strict=True):
                p.copy_(at + shift * h / length * d)
            values.append(end_to_end_loss(model, *data, **settings).loss.item())
        for p, at in zip(parameters, middle, strict=True):
            p.copy_(at)
        numeric = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
        analytic = sum((exact[n] * d).sum() for n, d in zip(names, directions, strict=True)) / length
        assert analytic.item() == pytest.approx(numeric, rel=1e-6, abs=1e-9), chosen


@pytest.mark.parametrize("meta", [{}, {"truncate_after": 2}, {"meta_gradient": "first-order"}], ids=str)
def test_recomputation_changes_no_gradient(meta: dict) -> None:
    model = make(small())
    data = batch(model.config, T=28)
    found = {}
    for schedule in ("none", "2-blocks", "blocks", "2-steps", "sqrt", "5-steps", "step", "all"):
        result = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, recompute=schedule, **meta)
        found[schedule] = gradients(model, result.loss)
    for expected in found.values():
        same(found["none"], expected, 1e-12)


@pytest.mark.parametrize("meta", [{}, {"truncate_after": 2}, {"meta_gradient": "first-order"}], ids=str)
def test_products_in_a_narrower_type_give_that_gradient(meta: dict) -> None:
    """Where weights are cast, those that meet the same vectors are one, whatever is computed again."""
    model = make(small())
    data = batch(model.config, T=28)
    exact = gradients(model, end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, **meta).loss)
    model.compute_dtype = torch.float32
    for schedule in ("none", "step", "all"):
        result = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, recompute=schedule, **meta)
        found = gradients(model, result.loss)
        assert not torch.equal(found["embedding.weight"], exact["embedding.weight"])
        same(found, exact, 1e-4)


@pytest.mark.parametrize(
    ("schedule", "truncate_after", "expected"),
    [
        ("blocks", 2, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        ("1-blocks", None, [(0, 7)]),
        ("2-steps", None, [(0, 2), (2, 7), (0, 2)]),
        ("sqrt", None, [(0, 2), (2, 4), (4, 7), (2, 4), (0, 2)]),
        ("5-steps", None, [(0, 1), (1, 3), (3, 5), (5, 7), (3, 5), (1, 3), (0, 1)]),
        ("sqrt", 2, [(0, 2), (2, 4), (4, 6), (6, 7), (2, 4), (0, 2)]),
        ("3-steps", 4, [(0, 3), (3, 4), (4, 7), (0, 3)]),
        ("step", None, [*((i, i + 1) for i in range(7)), *((i, i + 1) for i in range(5, -1, -1))]),
    ],
)
def test_segments_run_again_but_for_the_last(
    schedule: str, truncate_after: int | None, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    M, model, ran = config.mini_batch_size, make(config), []

    def watched(*args: Any, start: int, **options: Any) -> Scan:
        ran.append((start // M, (start + args[2].shape[1]) // M))
        return scan(*args, start=start, **options)

    monkeypatch.setattr("longread.outer_loop.losses.scan", watched)
    options = {"inner_lr": 0.7, "inner_clip": 0.5, "recompute": schedule, "truncate_after": truncate_after}
    end_to_end_loss(model, *batch(config, T=7 * M), **options).loss.backward()
    assert ran == expected


def between(
    model: Transformer, *, truncate_after: int | None = None, meta_gradient: str = "exact"
) -> Callable[[int, minimal.Weights, minimal.Caches], tuple[minimal.Weights, minimal.Caches]]:
    """What a mini-batch of the hand-written unroll begins with, by the definition of each meta-gradient."""
    blocks = range(model.config.num_prefix_blocks, model.config.num_blocks)
    initial = [[model.get_parameter(f"blocks.{i}.fast_mlp.{m}.weight") for m in ("gate", "up", "down")] for i in blocks]

    def begin(i: int, fast: minimal.Weights, caches: minimal.Caches) -> tuple[minimal.Weights, minimal.Caches]:
        cut = truncate_after is not None and i > 0 and i % truncate_after == 0
        if cut or meta_gradient == "first-order":  # W_i = W_0 + constant
            pairs = zip(fast, initial, strict=True)
            fast = [[w0 + (w - w0).detach() for w, w0 in zip(*both, strict=True)] for both in pairs]
        if cut:  # the lowest keys and values depend on no fast weight
            caches = [cache if j == 0 else tuple(x.detach() for x in cache) for j, cache in enumerate(caches)]
        return fast, caches

    return begin


KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "cut after 5": {"truncate_after": 5},
    "cut after 3": {"truncate_after": 3},
    "cut after 2": {"truncate_after": 2},
    "cut after 1": {"truncate_after": 1},
    "first-order": {"meta_gradient": "first-order"},
    "first-order, cut after 2": {"meta_gradient": "first-order", "truncate_after": 2},
}


def by_hand(
    model: Transformer, data: tuple[Tensor, Tensor, Tensor], *, lr: float, clip: float | None, **kind: Any
) -> dict[str, Tensor]:
    """The meta-gradient of a kind, from the hand-written unroll."""
    parameters = dict(model.named_parameters())
    losses, _ = minimal.end_to_end_losses(
        parameters, model.config, *data, lr=lr, clip=clip, between=between(model, **kind)
    )
    return gradients(model, minimal.mean_loss(losses, data[2]))


@pytest.mark.parametrize(
    ("kind", "clip"),
    [
        pytest.param(kind, clip, marks=() if clip or kind in ("exact", "first-order") else pytest.mark.slow)
        for kind, clip in itertools.product(KINDS, [None, 0.3])
    ],
)
def test_each_meta_gradient_is_what_its_definition_says(kind: str, clip: float | None) -> None:
    model = make(small())
    data = batch(model.config, T=28)
    result = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=clip, recompute="none", **KINDS[kind])
    same(gradients(model, result.loss), by_hand(model, data, lr=0.7, clip=clip, **KINDS[kind]), 1e-10)


def test_the_kinds_of_meta_gradient() -> None:
    """They share one loss; truncation meets the exact gradient at one end, and elsewhere they differ."""
    model = make(small())
    data = batch(model.config)
    settings = {"inner_lr": 0.7, "inner_clip": 0.5, "recompute": "none"}
    kinds = {name: kind for name, kind in KINDS.items() if name != "cut after 3"}
    results = {kind: end_to_end_loss(model, *data, **settings, **options) for kind, options in kinds.items()}
    for result in results.values():
        torch.testing.assert_close(result.nll, results["exact"].nll, rtol=1e-12, atol=1e-12)
    found = {kind: gradients(model, result.loss) for kind, result in results.items()}
    same(found["cut after 5"], found["exact"], 1e-12)
    for one, other in itertools.combinations([kind for kind in kinds if kind != "cut after 5"], 2):
        distance = torch.stack([(found[one][n] - found[other][n]).norm() for n in found[one]]).norm()
        assert distance > 1e-3, (one, other)


def test_the_first_order_meta_gradient_holds_every_step_constant() -> None:
    """Its W_i is W_0 plus a constant, so the loss is that of each mini-batch at constant offsets."""
    model = make(small(num_suffix_blocks=1))
    ids, targets, mask = batch(model.config, B=1)
    first = end_to_end_loss(model, ids, targets, mask, inner_lr=0.7, inner_clip=None, meta_gradient="first-order")
    offsets = {}
    for start in range(0, 20, 4):  # the weights that the exact unroll reaches before each mini-batch
        if start:
            _, fast = minimal.end_to_end_losses(
                dict(model.named_parameters()),
                model.config,
                ids[:, :start],
                targets[:, :start],
                mask[:, :start],
                lr=0.7,
                clip=None,
            )
            offsets[start] = [w.detach()[0] for w in fast[0]]
    names = [f"blocks.3.fast_mlp.{m}.weight" for m in ("gate", "up", "down")]
    total = 0.0
    for start in range(0, 20, 4):
        p = dict(model.named_parameters())
        for name, w in zip(names, offsets.get(start, []), strict=False):
            p[name] = p[name] + (w - p[name]).detach()
        losses, _ = minimal.end_to_end_losses(p, model.config, ids, targets, mask, lr=0.0, clip=None)
        total = total + losses[:, start // 4].mean() / 5
    same(gradients(model, first.loss), gradients(model, total), 1e-9)


def test_static_loss_is_the_end_to_end_loss_of_one_that_does_not_learn() -> None:
    model = make(small())
    data = batch(model.config)
    static = static_loss(model, *data)
    frozen = end_to_end_loss(model, *data, inner_lr=0.0, inner_clip=None)
    torch.testing.assert_close(static.nll, frozen.nll, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(static.loss, frozen.loss, rtol=1e-10, atol=1e-12)
    same(gradients(model, static.loss), gradients(model, frozen.loss), 1e-10)
    assert static.inner_grad_norm.shape == (2, 0)


def test_the_loss_is_a_mean_of_means() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config)
    result = static_loss(model, ids, targets, mask)
    by_hand = [
        [(row[i : i + 4] * keep[i : i + 4]).sum() / keep[i : i + 4].sum() for i in range(0, 20, 4)]
        for row, keep in zip(result.nll, mask, strict=True)
    ]
    torch.testing.assert_close(result.loss.detach(), torch.tensor(by_hand, dtype=torch.float64).mean())


def test_a_mini_batch_without_targets_teaches_nothing_and_keeps_gradients_finite() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config)
    mask[0, 4:8] = False
    result = end_to_end_loss(model, ids, targets, mask, inner_lr=1.0, inner_clip=1.0)
    assert result.mini_batch_loss[0, 1] == 0.0
    assert result.inner_grad_norm[0, 1] == 0.0
    found = gradients(model, result.loss)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_no_token_sees_the_future() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config)
    mask[:] = True
    before = end_to_end_loss(model, ids, targets, mask, inner_lr=1.0, inner_clip=1.0).nll
    for t in (1, 3, 4, 5, 11):
        changed_ids, changed_targets = ids.clone(), targets.clone()
        changed_ids[:, t] = (ids[:, t] + 1) % 19
        changed_targets[:, t - 1] = changed_ids[:, t]
        after = end_to_end_loss(model, changed_ids, changed_targets, mask, inner_lr=1.0, inner_clip=1.0).nll
        assert torch.equal(after[:, : t - 1], before[:, : t - 1])
        assert not torch.equal(after[:, t - 1 :], before[:, t - 1 :])


def test_a_batch_equals_its_sequences_alone() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config, B=3)
    together = end_to_end_loss(model, ids, targets, mask, inner_lr=1.0, inner_clip=0.5)
    alone = [
        end_to_end_loss(model, ids[b : b + 1], targets[b : b + 1], mask[b : b + 1], inner_lr=1.0, inner_clip=0.5)
        for b in range(3)
    ]
    torch.testing.assert_close(together.nll, torch.cat([a.nll for a in alone]), rtol=1e-10, atol=1e-12)
    same(gradients(model, together.loss), gradients(model, sum(a.loss for a in alone) / 3), 1e-10)


def test_a_length_that_is_no_multiple_of_the_mini_batch_is_refused() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config, T=18)
    for loss in (static_loss, lambda *x: end_to_end_loss(*x, inner_lr=1.0, inner_clip=1.0)):
        with pytest.raises(ValueError, match="18 tokens are no multiple of the mini-batch of 4"):
            loss(model, ids, targets, mask)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"meta_gradient": "second-order"}, "meta_gradient is 'second-order'; it must be one of exact, first-order"),
        ({"truncate_after": 0}, "truncate_after is 0; it must be at least 1, or None"),
        ({"truncate_after": -1}, "truncate_after is -1; it must be at least 1"),
        ({"recompute": "sqr"}, "recompute is 'sqr'; it must be one of auto, none, blocks"),
        ({"recompute": "0-steps"}, "recompute is '0-steps'; it must be .*, N-blocks or N-steps$"),
        ({"recompute": "5-steps"}, "recompute is '5-steps', but there are only 4 steps to compute again"),
        ({"recompute": "4-blocks"}, "recompute is '4-blocks', but there are only 3 blocks to compute again"),
    ],
)
def test_a_slip_is_no_other_mathematics(options: dict[str, Any], reason: str) -> None:
    model = make(small())
    with pytest.raises(ValueError, match=reason):
        end_to_end_loss(model, *batch(model.config), **{"inner_lr": 1.0, "inner_clip": 1.0} | options)


@pytest.mark.parametrize("schedule", ["blocks", "sqrt"])
def test_a_loss_that_is_computed_again_is_differentiated_once(schedule: str) -> None:
    model = make(small())
    loss = end_to_end_loss(model, *batch(model.config), inner_lr=0.7, inner_clip=0.5, recompute=schedule).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        loss.backward()


@pytest.mark.parametrize("frozen", [(2,), pytest.param((3,), marks=pytest.mark.slow), (2, 3)], ids=str)
def test_frozen_fast_weights_still_learn_and_change_no_other_gradient(frozen: tuple[int, ...]) -> None:
    model = make(small())
    data = batch(model.config, T=28)
    free = {}
    for schedule in ("none", "blocks", "sqrt", "step", "all"):
        for block in (2, 3):
            model.blocks[block].fast_mlp.requires_grad_(block not in frozen)
        outer = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, recompute=schedule)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(outer.loss, list(trained.values()))
        free[schedule] = dict(zip(trained, found, strict=True))
    model.requires_grad_(True)
    whole = gradients(model, end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, recompute="none").loss)
    for schedule, found in free.items():
        assert len(found) < len(whole), schedule
        same(found, {name: whole[name] for name in found}, 1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": "step"}, {"recompute": "1-steps"}, {"truncate_after": 2}, {"meta_gradient": "first-order"}],
    ids=str,
)
def test_gate_and_up_as_one_matrix_give_the_same_gradient(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where weights are cast, here to a wider type; each is the gradient of two matrices within rounding."""
    model = make(small()).float()
    model.compute_dtype = torch.float64
    tokens = batch(model.config)
    joined: list[type] = []

    def step(*args: Any, **others: Any) -> Scan:
        joined.append(type(args[1].fast[0]))
        return scan(*args, **others)

    monkeypatch.setattr("longread.outer_loop.losses.scan", step)
    found = gradients(model, end_to_end_loss(model, *tokens, inner_lr=0.7, inner_clip=0.3, **options).loss)
    monkeypatch.setattr(Transformer, "joined_initial_fast_weights", Transformer.initial_fast_weights)
    same(found, gradients(model, end_to_end_loss(model, *tokens, inner_lr=0.7, inner_clip=0.3, **options).loss), 1e-5)
    half = len(joined) // 2
    assert set(joined[:half]) == {JoinedSwiGLU}
    assert set(joined[half:]) == {SwiGLU}
