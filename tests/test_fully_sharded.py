"""Ranks that hold their rows of parameters alone train as one process does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.config import OptimizerConfig, UserError
from longread.model import Transformer
from longread.outer_loop import end_to_end_loss, static_loss
from longread.parallel import FullySharded, Launch, World, fill_rows, is_divided
from longread.parallel.rows import DividedRows, row_mesh
from longread.train import accumulate_gradient
from longread.train.gradient import StepLeft
from longread.train.meta_step import FullyShardedGradient, MetaStep, fully_sharded, whole_model
from longread.train.optimizer import freeze_below, make_optimizer, trained_parameters, update
from tests.meta_gradients import ESSENTIAL, NOISE, OTHERS, Case, Found, alone, batch, config, make, share
from tests.ranks import Ranks

SIZE = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(SIZE, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def reduced(rows: FullySharded, case: Case, model: Transformer) -> tuple[float, Tensor]:
    """Leaves the gradient of the whole batch; returns this rank's part of the loss, and its inner norms."""
    world = World(Launch.from_environment())
    mine = share(world.rank, world.size)
    found = FullyShardedGradient(rows, config(model, case))(mine, inner_lr=0.7)
    counted = float(mine.loss_mask.any(1).sum())
    weight = counted / world.total(counted)[0]
    rows.reduce(weight)
    return world.total(found.loss.item() * weight)[0], found.inner_grad_norm


def together(cases: list[tuple[Case, torch.dtype, int, bool]]) -> list[tuple[Found, float, bool]]:
    """Gradient and norm, and whether each parameter is divided; by case, type, ranks that divide, and `reshard`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FSDP2")
        return [computed(*case, times=2 if i == 0 else 1) for i, case in enumerate(cases)]


def computed(case: Case, dtype: torch.dtype, divided: int, reshard: bool, *, times: int) -> tuple[Found, float, bool]:
    """The last of several gradients, each after the one before was forgotten."""
    model = make(dtype)
    rows = fully_sharded(model, row_mesh(SIZE, divided, "cpu"), reshard=reshard)
    stayed = all(map(is_divided, model.parameters()))
    for _ in range(times):
        rows.clear()
        loss, norms = reduced(rows, case, model)
    gradients = {name: p.grad.full_tensor() for name, p in rows.parameters.items() if p.grad is not None}  # type: ignore[attr-defined]
    return Found(gradients, loss, norms), rows.norm().item(), stayed


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [
                *((case, 2, i % 2 == 0) for i, case in enumerate(ESSENTIAL)),
                (Case("sqrt", micro_batch_size=1), 2, True),
                (Case("sqrt", micro_batch_size=1), 2, False),
            ],
            id="essential",
        ),
        pytest.param(
            [(case, 1 if i == 1 else 2, i % 2 == 0) for i, case in enumerate(OTHERS)],
            id="others",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_meta_gradient_is_that_of_one_process(ranks: Ranks, cases: list[tuple[Case, int, bool]]) -> None:
    answers = ranks.run(together, [(case, torch.float64, *how) for case, *how in cases])
    for i, (case, *how) in enumerate(cases):
        exact = alone(case)
        norm = torch.stack([g.norm() for g in exact.gradients.values()]).norm().item()
        for found, found_norm, stayed in (answer[i] for answer in answers):
            assert found.error(exact) <= 1e-12, (case, how)
            assert found.loss == pytest.approx(exact.loss, rel=1e-12)
            assert found_norm == pytest.approx(norm, rel=1e-12)
            assert stayed
        norms = torch.cat([answer[i][0].inner_grad_norm for answer in answers])
        torch.testing.assert_close(norms, exact.inner_grad_norm, rtol=1e-12, atol=0)


def test_float32_errs_no_more_than_one_process(ranks: Ranks) -> None:
    case = Case("none", clip=0.2)
    exact = alone(case)
    ((found, _, _),) = ranks.run(together, [(case, torch.float32, 2, True)])[0]
    assert found.error(exact) <= NOISE * alone(case, torch.float32).error(exact)


def three_and_one() -> dict[str, Tensor]:
    model = make(torch.float64)
    rows = fully_sharded(model, row_mesh(SIZE, SIZE, "cpu"), reshard=False)
    FullyShardedGradient(rows, config(model, Case("sqrt", micro_batch_size=3)))(batch(), inner_lr=0.7)
    rows.reduce(1 / SIZE)
    return {name: p.grad.full_tensor() for name, p in rows.parameters.items()}  # type: ignore[union-attr]


def test_micro_batches_need_not_be_equal(ranks: Ranks) -> None:
    exact = alone(Case("sqrt"))
    for gradients in ranks.run(three_and_one):
        assert Found(gradients, exact.loss, exact.inner_grad_norm).error(exact) <= 1e-12


OPTIMIZER = OptimizerConfig(lr=0.01, warmup_steps=0, decay_steps=10, clip=0.5, weight_decay=0.1)
CASE = Case("blocks", clip=0.2)


def trained(rows: DividedRows, model: Transformer, gradient: Any) -> dict[str, Tensor]:
    """The moments of `rows` after three steps."""
    optimizer = make_optimizer(model, OPTIMIZER, rows)
    for step in range(3):
        gradient()
        update(model, optimizer, OPTIMIZER, step, rows.norm(), rows)
    return {name: optimizer.state[p]["exp_avg_sq"] for name, p in rows.own.items()}


def trained_together(trained_blocks: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    model = make(torch.float64)
    freeze_below(model, trained_blocks)
    rows = fully_sharded(model, row_mesh(SIZE, SIZE, "cpu"))
    places = [p.data_ptr() for p in rows.own.values()]
    moments = trained(rows, model, lambda: reduced(rows, CASE, model))
    stayed = (
        places
        == [p.data_ptr() for p in rows.own.values()]
        == [
            p.to_local().data_ptr()
            for p in rows.parameters.values()  # type: ignore[operator]
        ]
    )
    return whole_model(model, "cpu").state_dict(), moments, stayed  # type: ignore[union-attr]


@pytest.mark.parametrize("trained_blocks", [None, 3])
def test_three_steps_are_those_of_one_process(ranks: Ranks, trained_blocks: int | None) -> None:
    model = make(torch.float64)
    freeze_below(model, trained_blocks)
    rows = DividedRows(trained_parameters(model))
    moments = trained(rows, model, lambda: accumulate_gradient(model, config(model, CASE), batch(), inner_lr=0.7))
    answers = ranks.run(trained_together, trained_blocks)
    for state, _, stayed in answers:
        assert stayed
        for name, exact in model.state_dict().items():
            torch.testing.assert_close(state[name], exact, rtol=1e-10, atol=1e-12, msg=name)
    for name, exact in moments.items():
        found = torch.cat([answer[1][name] for answer in answers])
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-15, msg=name)


def moved() -> tuple[bool, bool, bool, str]:
    model, other = make(torch.float64), make(torch.float64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    fully_sharded(model, row_mesh(SIZE, SIZE, "cpu"))
    fill_rows(model, other.state_dict())
    on_all, on_first = (whole_model(model, "cpu", on_all=on_all) for on_all in (True, False))
    with pytest.raises(UserError) as caught:
        fill_rows(model, {name: tensor[:1] for name, tensor in other.state_dict().items()})
    same = [
        copy is not None and all(map(torch.equal, copy.state_dict().values(), other.state_dict().values()))
        for copy in (on_all, on_first)
    ]
    assert on_all is not None
    assert on_all.compute_dtype == model.compute_dtype
    return same[0], same[1], on_first is None, str(caught.value)


def test_whole_tensors_come_and_go(ranks: Ranks) -> None:
    first, second = ranks.run(moved)
    assert first[:3] == (True, True, False)
    assert second[:3] == (True, False, True)
    assert "embedding.weight is (1, 32), but the model's is (19, 32)" in first[3]


def left(stops: bool, reshard: bool) -> float:
    """The error of a gradient after one that was left between two micro-batches."""
    model, case = make(torch.float64), Case("none", micro_batch_size=1)
    rows = fully_sharded(model, row_mesh(SIZE, SIZE, "cpu"), reshard=reshard)
    gradient = FullyShardedGradient(rows, config(model, case))
    with pytest.raises(StepLeft):
        gradient(batch(), inner_lr=0.7, stopped=lambda: True)
    if stops:
        with pytest.raises(ValueError, match="last call" if not reshard else "not"):
            rows.reduce(1.0)
        rows.clear()
    gradient(batch(), inner_lr=0.7)
    rows.reduce(1 / SIZE)
    found = {name: p.grad.full_tensor() for name, p in rows.parameters.items()}  # type: ignore[union-attr]
    exact = alone(case)
    return Found(found, exact.loss, exact.inner_grad_norm).error(exact)


@pytest.mark.parametrize("reshard", [True, False])
def test_a_step_that_was_left_leaves_nothing(ranks: Ranks, reshard: bool) -> None:
    assert ranks.run(left, True, reshard)[0] <= 1e-12
    assert ranks.run(left, False, reshard)[0] > 1e-3


def refusals() -> list[str]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    said: list[str] = []
    mesh, mine = row_mesh(SIZE, SIZE, "cpu"), share(0, 2)
    inner = {"inner_lr": 0.7, "inner_clip": None}

    def refused(kind: type[Exception], attempt: Any) -> None:
        with pytest.raises(kind) as caught:
            attempt()
        said.append(str(caught.value))

    model = make(torch.float32)
    rows = fully_sharded(model, mesh)
    gradient = FullyShardedGradient(rows, config(model, Case()))
    refused(UserError, lambda: end_to_end_loss(model, *mine, **inner))
    refused(UserError, lambda: static_loss(model, *mine))

    gradient(mine, inner_lr=0.7)
    refused(ValueError, lambda: rows.reduce(0.25))
    rows.clear()

    for module in (rows.root, *model.prefix):  # by hand: nobody knows when gradients are to be summed
        module.unshard()
    end_to_end_loss(model, *share(torch.distributed.get_rank(), SIZE), **inner, recompute="none").loss.backward()
    for module in (rows.root, *model.prefix):
        module.reshard()
    refused(ValueError, lambda: rows.reduce(0.5))

    model.state_group = torch.distributed.group.WORLD
    refused(UserError, lambda: gradient(mine, inner_lr=0.7))

    model = make(torch.float32)
    for block in model.suffix:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "above")
    hooked = fully_shard(MetaStep(model), mesh=mesh)
    refused(UserError, lambda: hooked(config(model, Case()), mine, 0.7))

    rounded = fully_shard(MetaStep(make(torch.float32)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refused(UserError, lambda: rounded(config(model, Case()), mine, 0.7))
    return said


def test_what_would_go_wrong_unseen_is_refused(ranks: Ranks) -> None:
    whole, static, weight, by_hand, state, above, rounded = ranks.run(refusals)[0]
    for each in (whole, static, above):
        assert "longread.train.meta_step" in each
    assert "0.25" in weight
    assert "FullySharded.backward" in by_hand
    assert "parallelism.state" in state
    assert "MixedPrecisionPolicy" in rounded
