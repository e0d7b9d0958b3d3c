"""Meta-gradients as numbers: against a hand-written unroll, finite differences, and each other."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import naive
from longread.config import ModelConfig, OptimizerConfig, RunConfig
from longread.inner_loop.step import Scan, scan
from longread.model import Transformer, initialize
from longread.ops.attention import KEPT_OPERATIONS
from longread.outer_loop import (
    UPDATE_BYTES,
    Fit,
    OuterLoss,
    Schedule,
    activation_budget,
    choose_recompute,
    end_to_end_loss,
    fit,
    free_bytes,
    graph_bytes,
    static_loss,
)
from longread.outer_loop.memory import block_bytes
from longread.recipes import recipe
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
    "no norms": {"pre_norm": False, "post_norm": False, "qk_norm": False, "init_std": 0.1},
}


@pytest.mark.parametrize("clip", [None, 0.3, 3.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_meta_gradient_is_that_of_a_hand_written_unroll(variant: str, clip: float | None) -> None:
    model = make(small(**VARIANTS[variant]))
    ids, targets, mask = batch(model.config)
    losses, _ = naive.end_to_end_losses(
        dict(model.named_parameters()), model.config, ids, targets, mask, lr=0.7, clip=clip
    )
    result = end_to_end_loss(model, ids, targets, mask, inner_lr=0.7, inner_clip=clip, recompute="none")
    torch.testing.assert_close(result.mini_batch_loss, losses.detach(), rtol=1e-10, atol=1e-12)
    same(gradients(model, result.loss), gradients(model, losses.mean()), 1e-10)


def test_the_meta_gradient_is_that_of_finite_differences() -> None:
    """Two entries of every kind of parameter, four-point central differences."""
    model = make(small())
    data = batch(model.config)
    settings = {"inner_lr": 0.7, "inner_clip": 0.5}
    exact = gradients(model, end_to_end_loss(model, *data, **settings).loss)
    h = 1e-4
    for name, parameter in model.named_parameters():
        for index in (0, parameter.numel() // 2 + 1):
            if name == "embedding.weight":
                index += int(data[0][0, 0]) * model.config.width
            flat = parameter.data.view(-1)
            index, middle, values = min(index, flat.numel() - 1), flat[min(index, flat.numel() - 1)].item(), []
            for shift in (-2, -1, 1, 2):
                flat[index] = middle + shift * h
                values.append(end_to_end_loss(model, *data, **settings).loss.item())
            flat[index] = middle
            numeric = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
            assert exact[name].view(-1)[index].item() == pytest.approx(numeric, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("meta", [{}, {"truncate_after": 2}, {"meta_gradient": "first-order"}], ids=str)
def test_recomputation_changes_no_gradient(meta: dict) -> None:
    model = make(small())
    data = batch(model.config, T=28)
    found = {}
    for schedule in ("none", "blocks", "sqrt", "step"):
        result = end_to_end_loss(model, *data, inner_lr=0.7, inner_clip=0.5, recompute=schedule, **meta)
        found[schedule] = gradients(model, result.loss)
    for schedule in ("blocks", "sqrt", "step"):
        same(found[schedule], found["none"], 1e-12)


@pytest.mark.parametrize(
    ("schedule", "truncate_after", "expected"),
    [
        ("blocks", 2, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        ("sqrt", None, [(0, 1), (1, 4), (4, 7), (1, 4), (0, 1)]),
        ("sqrt", 2, [(0, 1), (1, 2), (2, 4), (4, 6), (6, 7), (4, 6), (2, 4), (1, 2), (0, 1)]),
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


def kept_bytes(loss: Callable[[], OuterLoss], model: Transformer) -> int:
    """What is held for the gradient of a loss, by autograd or by Python, parameters left out."""
    before = {x.untyped_storage().data_ptr() for x in (*tensors_of_python(), *model.parameters())}
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in before:
            held[storage.data_ptr()] = storage.nbytes(), x  # the tensor too: no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = loss()
    for x in tensors_of_python():
        pack(x)
    del result
    return sum(nbytes for nbytes, _ in held.values())


def tensors_of_python() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["swa", "full", "e2e", "mamba2", "gdn", "kvb"])
def test_blocks_that_run_again(method: str, dtype: torch.dtype) -> None:
    """The same gradient of the static loss, from inputs and attention's results alone."""
    config = dataclasses.replace(recipe("toy", method=method).model, num_blocks=4)
    model, K = make(config), config.window_size
    if dtype == torch.bfloat16:
        model.float().compute_dtype = dtype
    found, of_blocks = {}, []
    for T in (2 * K, 4 * K):
        kept = {}
        for schedule in ("none", "blocks"):
            run = functools.partial(static_loss, model, *batch(config, T=T, B=1), recompute=schedule)
            kept[schedule] = kept_bytes(run, model)
            found[schedule] = gradients(model, run().loss)
        same(found["blocks"], found["none"], 1e-12)
        meant = (config.num_blocks + attentions(config)) * T * config.width * dtype.itemsize
        assert meant < kept["blocks"] < meant + 0.06 * kept["none"]  # the head's
        of_blocks.append(kept["none"] - kept["blocks"])
    grown = (of_blocks[1] - of_blocks[0]) / (config.num_blocks * 2 * K)  # casts of weights left out
    assert grown == pytest.approx(block_bytes(config, 4 * K, dtype.itemsize, kernels=False), rel=0.3)


def attentions(config: ModelConfig) -> int:
    return sum("attention" in config.mixers_of(i) for i in range(config.num_blocks))


class Operations(TorchDispatchMode):
    """Counts those behind attention at order 1."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation.name() in KEPT_OPERATIONS
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["swa", "full", "hybrid", "gdn"])
def test_a_block_that_runs_again_does_not_attend_again(method: str) -> None:
    config = recipe("toy", method=method).model
    model = make(config)
    data = batch(config, T=2 * config.window_size, B=1)
    counts = {}
    for schedule in ("none", "blocks"):
        with Operations() as operations:
            static_loss(model, *data, recompute=schedule).loss.backward()
        counts[schedule] = operations.count
    assert counts["none"] == counts["blocks"] == attentions(config)


def test_each_schedule_keeps_less() -> None:
    config = recipe("toy").model
    model, data = make(config), batch(config, T=16 * config.mini_batch_size, B=1)
    kept = [
        kept_bytes(
            functools.partial(end_to_end_loss, model, *data, inner_lr=1.0, inner_clip=1.0, recompute=schedule), model
        )
        for schedule in ("none", "blocks", "sqrt")
    ]
    assert kept[1] < 0.7 * kept[0]
    assert kept[2] < 0.7 * kept[1]


def test_a_block_that_runs_again_lets_go_of_its_keys() -> None:
    config = small()
    model, (ids, _, _) = make(config), batch(config)
    lower, upper = model.empty_pasts(2)
    hidden, own = model.lower(ids, lower, start=0, recompute=True)
    assert own == ()
    assert model.upper(hidden, None, upper, start=0, order=1, recompute=True)[1] == ()


def test_the_kinds_of_meta_gradient() -> None:
    """They share one loss; truncation meets the exact gradient at one end, and each is what its definition says."""
    model = make(small())
    data = batch(model.config)
    settings = {"inner_lr": 0.7, "inner_clip": 0.5, "recompute": "none"}
    kinds = {
        "exact": {},
        "cut after 5": {"truncate_after": 5},
        "cut after 2": {"truncate_after": 2},
        "cut after 1": {"truncate_after": 1},
        "first-order": {"meta_gradient": "first-order"},
    }
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
            _, fast = naive.end_to_end_losses(
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
        losses, _ = naive.end_to_end_losses(p, model.config, ids, targets, mask, lr=0.0, clip=None)
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


def test_a_mini_batch_without_targets_counts_zero_and_keeps_gradients_finite() -> None:
    model = make(small())
    ids, targets, mask = batch(model.config)
    mask[0, 4:8] = False
    result = end_to_end_loss(model, ids, targets, mask, inner_lr=1.0, inner_clip=1.0)
    assert result.mini_batch_loss[0, 1] == 0.0
    assert result.inner_grad_norm[0, 1] == 0.0
    found = gradients(model, result.loss)
    assert all(gradient.isfinite().all() for gradient in found.values())
    # nothing was learned from it: the same as a loop that skips the step
    losses, _ = naive.end_to_end_losses(
        dict(model.named_parameters()), model.config, ids, targets, mask, lr=1.0, clip=None
    )
    unclipped = end_to_end_loss(model, ids, targets, mask, inner_lr=1.0, inner_clip=None)
    same(gradients(model, unclipped.loss), gradients(model, losses.mean()), 1e-10)


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
    ],
)
def test_a_slip_is_no_other_mathematics(options: dict[str, Any], reason: str) -> None:
    model = make(small())
    with pytest.raises(ValueError, match=reason):
        end_to_end_loss(model, *batch(model.config), **{"inner_lr": 1.0, "inner_clip": 1.0} | options)


def test_the_schedule_follows_the_budget() -> None:
    config = small()
    sizes: dict[str, Any] = {"batch_size": 2, "context_length": 100 * 4, "itemsize": 4}
    for loss, schedules in (("end-to-end", ["none", "blocks", "sqrt", "step"]), ("static", ["none", "blocks"])):
        need = graph_bytes(config, loss, kernels=False, **sizes)
        choose = functools.partial(choose_recompute, config, loss, device=CPU, **sizes)
        assert list(need) == schedules
        assert need["none"] > need["blocks"]
        for schedule, size in need.items():
            cheaper = [other for other in schedules[: schedules.index(schedule)] if need[other] <= size]
            assert choose(budget=size) == (cheaper[0] if cheaper else schedule)
        assert choose(budget=1) == min(need, key=need.__getitem__)
        assert choose() == "none"  # a toy fits any machine


def a_run(loss: str = "end-to-end", **fields: Any) -> RunConfig:
    shape = {"batch_size": 12, "context_length": 16, "steps": 1, "optimizer": OptimizerConfig(lr=1e-3)}
    return RunConfig(name="a", model=small(), loss=loss, **shape | fields)


def test_a_batch_is_cut_before_anything_is_computed_again() -> None:
    def need(size: int, loss: str = "end-to-end") -> dict[Schedule, int]:
        return graph_bytes(small(), loss, batch_size=size, context_length=16, itemsize=4, kernels=False)

    def found(budget: float, **fields: Any) -> Fit:
        return fit(a_run(**fields), itemsize=4, kernels=False, budget=budget)

    assert found(need(12)["none"]) == Fit(12, "none", 0)
    assert found(need(12)["none"] - 1) == Fit(6, "none", 0)
    assert found(need(1)["none"]) == Fit(1, "none", 0)
    assert found(need(1)["none"] - 1)[:2] == (1, "blocks")
    assert found(1) == Fit(1, min(need(1), key=need(1).__getitem__), min(need(1).values()) - 1)
    # what is asked for stays
    assert found(need(12)["none"] - 1, micro_batch_size=12)[:2] == (12, "blocks")
    assert found(need(4)["sqrt"], recompute="sqrt") == Fit(4, "sqrt", 0)
    assert found(need(4, "static")["blocks"], loss="static", recompute="sqrt") == Fit(4, "sqrt", 0)


def test_what_the_update_needs_is_left() -> None:
    assert activation_budget(10**9, small()) == 0.8 * 10**9 - UPDATE_BYTES * small().num_parameters


def test_free_memory_is_what_the_system_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longread.outer_loop.memory.MEMORY_INFO", info := tmp_path / "meminfo")
    monkeypatch.setattr("longread.outer_loop.memory.CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.__getitem__)
    assert free_bytes(CPU) == 2**31  # neither: macOS
    info.write_text("MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  5000 kB\n")
    assert free_bytes(CPU) == 5000 * 1024
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 700000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    assert free_bytes(CPU) == 1_700_000


@pytest.mark.parametrize("schedule", ["blocks", "sqrt"])
def test_a_loss_that_is_computed_again_is_differentiated_once(schedule: str) -> None:
    model = make(small())
    loss = end_to_end_loss(model, *batch(model.config), inner_lr=0.7, inner_clip=0.5, recompute=schedule).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        loss.backward()


@pytest.mark.parametrize("frozen", [(2,), (3,), (2, 3)], ids=str)
def test_frozen_fast_weights_still_learn_and_change_no_other_gradient(frozen: tuple[int, ...]) -> None:
    model = make(small())
    data = batch(model.config, T=28)
    free = {}
    for schedule in ("none", "blocks", "sqrt", "step"):
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
    ("size", "method", "context", "sequences", "schedule", "peak"),
    [
        ("125m", "e2e", 8192, 4, "none", 28.0),
        ("125m", "swa", 8192, 4, "none", 16.6),
        ("125m", "e2e", 131_072, 1, "none", 108.3),
        ("760m", "e2e", 32_768, 1, "none", 100.0),
        ("760m", "full", 32_768, 1, "none", 60.0),
        ("760m", "e2e", 131_072, 1, "sqrt", 56.4),
        ("760m", "swa", 131_072, 1, "blocks", 38.8),
        ("760m", "full", 131_072, 1, "blocks", 38.9),
        ("3b", "e2e", 8192, 1, "none", 86.7),
        ("3b", "swa", 8192, 1, "none", 65.8),
        ("3b", "e2e", 32_768, 1, "sqrt", 84.6),
        ("3b", "full", 65_536, 1, "blocks", 62.2),
        ("3b", "e2e", 65_536, 1, "sqrt", 103.9),
    ],
)
def test_with_kernels_the_estimate_is_what_was_measured(
    size: str, method: str, context: int, sequences: int, schedule: Schedule, peak: float
) -> None:
    """GiB of whole training steps on an H200 (benchmarks/results): weights, their update, and the graph."""
    config = recipe(size, method=method)
    shape = {"batch_size": sequences, "context_length": context, "itemsize": 2}
    need = graph_bytes(config.model, config.loss, kernels=True, **shape)[schedule]
    assert (need + 16 * config.model.num_parameters) / 2**30 == pytest.approx(peak, rel=0.15)
