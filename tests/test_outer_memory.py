"""What an outer step keeps in memory, what the estimates say of it, and what is chosen by them."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from longread.config import ModelConfig, OptimizerConfig, Recompute, RunConfig
from longread.flops import sequence_flops
from longread.model import Transformer
from longread.ops.attention import KEPT_OPERATIONS
from longread.outer_loop import (
    UPDATE_BYTES,
    Fit,
    OuterLoss,
    activation_budget,
    choose_recompute,
    end_to_end_loss,
    fit,
    graph_bytes,
    static_loss,
)
from longread.outer_loop.memory import block_bytes
from longread.recipes import recipe, without_fast_weights
from tests.test_outer_loop import CPU, batch, gradients, make, same, small


@pytest.fixture(autouse=True)
def _few_objects() -> None:
    """What is there before the test is nothing that it keeps: the garbage collector need not look at it."""
    gc.collect()
    gc.freeze()


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


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("full", torch.float64),
        ("mamba2", torch.float64),
        ("gdn", torch.float64),
        ("kvb", torch.float64),
        ("e2e", torch.bfloat16),
        *(pytest.param(method, torch.float64, marks=pytest.mark.slow) for method in ("swa", "e2e")),
        *(
            pytest.param(method, torch.bfloat16, marks=pytest.mark.slow)
            for method in ("swa", "full", "mamba2", "gdn", "kvb")
        ),
    ],
    ids=str,
)
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
            if not of_blocks:
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


def peak_bytes(loss: Callable[[], OuterLoss], model: Transformer) -> int:
    """The most that a loss and its gradient hold at a time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        torch.autograd.grad(loss().loss, list(model.parameters()))
    changes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    changes.sort(key=lambda change: change.start_ns())
    return max(itertools.accumulate(change.nbytes() for change in changes))


def test_the_fewer_blocks_run_again_the_more_is_held() -> None:
    """Block for block as estimated; the topmost is gone before another one runs again, so keeping it costs nothing."""
    config = dataclasses.replace(recipe("toy", method="full").model, num_blocks=4)
    model, data = make(config).float(), batch(config, T=256, B=1)
    need = graph_bytes(config, "static", batch_size=1, context_length=256, itemsize=4, kernels=False)
    found = {
        schedule: peak_bytes(functools.partial(static_loss, model, *data, recompute=schedule), model)
        for schedule in ("none", "2-blocks", "3-blocks", "blocks")
    }
    for schedule in ("none", "2-blocks"):
        assert found[schedule] == pytest.approx(need[schedule], rel=0.15), schedule
    assert found["3-blocks"] == pytest.approx(found["blocks"], rel=0.02)


def test_the_fewer_steps_run_again_the_more_is_held() -> None:
    """In the proportions of the estimates, which are about twice what these small networks hold."""
    config = recipe("toy").model
    M, B = config.mini_batch_size, 2
    model, data = make(config).float(), batch(config, T=8 * M, B=B)
    need = graph_bytes(config, "end-to-end", batch_size=B, context_length=8 * M, itemsize=4, kernels=False)
    run = functools.partial(end_to_end_loss, model, *data, inner_lr=1.0, inner_clip=1.0)
    found = {
        schedule: peak_bytes(functools.partial(run, recompute=schedule), model)
        for schedule in ("blocks", "3-steps", "6-steps")
    }
    for schedule, peak in found.items():
        assert peak / found["blocks"] == pytest.approx(need[schedule] / need["blocks"], rel=0.15), schedule


def test_a_block_that_runs_again_lets_go_of_its_keys() -> None:
    config = small()
    model, (ids, _, _) = make(config), batch(config)
    lower, upper = model.empty_pasts(2)
    hidden, own = model.lower(ids, lower, start=0, recompute=4)
    assert own == ()
    assert model.upper(hidden, None, upper, start=0, order=1, recompute=4)[1] == ()


def test_the_schedule_follows_the_budget() -> None:
    config = small()
    sizes: dict[str, Any] = {"batch_size": 2, "context_length": 100 * 4, "itemsize": 4}
    for loss in ("end-to-end", "static"):
        need = graph_bytes(config, loss, kernels=False, **sizes)
        choose = functools.partial(choose_recompute, config, loss, device=CPU, **sizes)
        work = [sequence_flops(config, 400, loss, schedule).recomputed for schedule in need]
        assert work[:-1] == sorted(work[:-1])  # the last is "all", whose steps are those of "sqrt"
        assert need["none"] > need["1-blocks"] > need["blocks"]
        schedules = list(need)
        for schedule, size in [*need.items()][::7]:
            cheaper = [other for other in schedules[: schedules.index(schedule)] if need[other] <= size]
            assert choose(budget=size) == (cheaper[0] if cheaper else schedule)
        assert choose(budget=1) == min(need, key=need.__getitem__)
        assert choose() == "none"  # a toy fits any machine


def a_run(loss: str = "end-to-end", **fields: Any) -> RunConfig:
    shape = {"batch_size": 12, "context_length": 16, "steps": 1, "optimizer": OptimizerConfig(lr=1e-3)}
    return RunConfig(name="a", loss=loss, **shape | {"model": small()} | fields)


def test_a_batch_is_cut_before_anything_is_computed_again() -> None:
    def need(size: int, loss: str = "end-to-end") -> dict[Recompute, int]:
        return graph_bytes(small(), loss, batch_size=size, context_length=16, itemsize=4, kernels=False)

    def found(budget: float, **fields: Any) -> Fit:
        return fit(a_run(**fields), itemsize=4, kernels=False, budget=budget)

    assert found(need(12)["none"]) == Fit(12, "none", 0)
    assert found(need(12)["none"] - 1) == Fit(6, "none", 0)
    assert found(need(1)["none"]) == Fit(1, "none", 0)
    assert found(need(1)["none"] - 1)[:2] == (1, "1-blocks")
    assert found(need(1)["blocks"])[:2] == (1, "2-blocks")  # the topmost is gone before another one runs again
    assert found(1) == Fit(1, min(need(1), key=need(1).__getitem__), min(need(1).values()) - 1)
    # what is asked for stays
    assert found(need(12)["none"] - 1, micro_batch_size=12)[:2] == (12, "1-blocks")
    assert found(need(4)["sqrt"], recompute="sqrt") == Fit(4, "sqrt", 0)
    assert found(need(4, "static")["blocks"], loss="static", recompute="sqrt") == Fit(4, "sqrt", 0)


def test_what_the_update_needs_is_left() -> None:
    assert activation_budget(10**9, small()) == 0.8 * 10**9 - UPDATE_BYTES * small().num_parameters


def converted(**fields: Any) -> ModelConfig:
    """A pretrained network of Qwen 3's kind with fast MLPs in a quarter of its blocks, as a conversion gives it."""
    shared = {"vocab_size": 151_936, "kv_heads": 8, "head_size": 128, "window_size": 1024, "mini_batch_size": 256}
    return ModelConfig(**shared | {"post_norm": False, "num_suffix_blocks": fields["num_blocks"] // 4} | fields)


SMALL = converted(width=1024, num_blocks=28, num_heads=16, mlp_hidden=3072)
"""0.66B parameters."""
LARGE = converted(width=2560, num_blocks=36, num_heads=32, mlp_hidden=9728)
"""4.69B."""


@pytest.mark.parametrize(
    ("model", "loss", "trained_blocks", "schedule"),
    [
        (SMALL, "end-to-end", None, "none"),
        (LARGE, "end-to-end", 9, "21-steps"),
        (LARGE, "end-to-end", None, None),  # weights, gradients and moments alone take 70 GiB
        (without_fast_weights(LARGE), "static", None, "35-blocks"),
        (without_fast_weights(LARGE), "static", 9, "none"),
    ],
)
def test_what_of_a_pretrained_model_is_trained_at_8k_on_80_gib(
    model: ModelConfig, loss: str, trained_blocks: int | None, schedule: Recompute | None
) -> None:
    config = a_run(loss, model=model, batch_size=8, context_length=8192, trained_blocks=trained_blocks)
    budget = activation_budget(80 * 2**30 - 4 * model.num_parameters, model, trained_blocks)
    found = fit(config, itemsize=2, kernels=True, budget=budget)
    assert (found.recompute if not found.missing else None) == schedule


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
    size: str, method: str, context: int, sequences: int, schedule: Recompute, peak: float
) -> None:
    """GiB of whole training steps on an H200 (benchmarks/results): weights, their update, and the graph."""
    config = recipe(size, method=method)
    shape = {"batch_size": sequences, "context_length": context, "itemsize": 2}
    need = graph_bytes(config.model, config.loss, kernels=True, **shape)[schedule]
    assert (need + 16 * config.model.num_parameters) / 2**30 == pytest.approx(peak, rel=0.15)
