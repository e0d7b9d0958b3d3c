"""Two GPUs find the meta-gradient in bfloat16 as well as one does; they sum over NCCL."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longread.parallel import Launch, World, divide_state
from longread.parallel.rows import row_mesh
from longread.train import accumulate_gradient
from longread.train.captured import CapturedGradient
from longread.train.meta_step import FullyShardedGradient, fully_sharded
from tests.meta_gradients import NOISE, Case, Found, alone, batch, config, make, share
from tests.ranks import Ranks

SIZE = 2
CASES = (Case("none", clip=0.2), Case("sqrt", clip=0.2, micro_batch_size=1), Case("step", clip=None))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < SIZE, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(SIZE, tmp_path_factory.mktemp("ranks"), "cpu:gloo,cuda:nccl") as started:
        yield started


def on_cpu(gradients: dict[str, Tensor], loss: Tensor, norms: Tensor) -> Found:
    return Found({name: gradient.cpu() for name, gradient in gradients.items()}, loss.item(), norms.cpu())


def fully_sharded_together() -> list[Found]:
    world, results = World(Launch.from_environment()), []
    for i, case in enumerate(CASES):
        model = make(torch.bfloat16, "cuda")
        rows = fully_sharded(model, row_mesh(SIZE, SIZE, "cuda"), reshard=i % 2 == 0)
        mine = share(world.rank, SIZE).to("cuda")
        found = FullyShardedGradient(rows, config(model, case))(mine, inner_lr=0.7)
        counted = float(mine.loss_mask.any(1).sum())
        rows.reduce(counted / world.total(counted)[0])
        gradients = {name: p.grad.full_tensor() for name, p in rows.parameters.items()}  # type: ignore[union-attr]
        results.append(on_cpu(gradients, found.loss, found.inner_grad_norm))
    return results


def state_parallel_together(captured: bool) -> list[Found]:
    """Of two replays where captured: the second is no longer the one that was compared."""
    warnings.simplefilter("error")
    world, results = World(Launch.from_environment()), []
    for case in CASES:
        model = make(torch.bfloat16, "cuda")
        model.state_group = divide_state(world, model.config, SIZE, "cuda")
        whole = batch().to("cuda")
        if captured:
            gradient = CapturedGradient(model, config(model, case))
            for _ in range(2):
                found = gradient(whole, inner_lr=0.7)
        else:
            found = accumulate_gradient(model, config(model, case), whole, inner_lr=0.7)
        gradients = {name: p.grad / SIZE for name, p in model.named_parameters()}  # type: ignore[operator]
        for each in gradients.values():
            dist.all_reduce(each)
        results.append(on_cpu(gradients, found.loss, found.inner_grad_norm))
        del found
    return results


def no_worse_than_one(answers: list[Found]) -> None:
    for case, found in zip(CASES, answers, strict=True):
        exact, one = alone(case, torch.float64, "cuda"), alone(case, torch.bfloat16, "cuda")
        exact, one = (on_cpu(f.gradients, torch.tensor(f.loss), f.inner_grad_norm) for f in (exact, one))
        assert found.error(exact) <= NOISE * one.error(exact), case


def test_parameters_divided_among_gpus(ranks: Ranks) -> None:
    no_worse_than_one(ranks.run(fully_sharded_together)[0])


@pytest.mark.parametrize("captured", [False, True])
def test_fast_weights_divided_among_gpus(ranks: Ranks, captured: bool) -> None:
    answers = ranks.run(state_parallel_together, captured)
    no_worse_than_one(answers[0])
    for first, second in zip(*answers, strict=True):
        torch.testing.assert_close(first.inner_grad_norm, second.inner_grad_norm, rtol=0, atol=0)
