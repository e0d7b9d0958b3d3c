"""Ranks that divide the hidden units of the fast MLPs find the meta-gradient of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longread.config import UserError
from longread.inner_loop import InnerOptimizer
from longread.ops.clipped_sgd import clipped_sgd
from longread.ops.collective import enter, leave, part
from longread.ops.fast_mlp import fast_mlp
from longread.parallel import Launch, World, divide_state
from longread.train import accumulate_gradient
from tests import tiny
from tests.meta_gradients import ESSENTIAL, NOISE, OTHERS, Case, Found, alone, config, make, share
from tests.ranks import Ranks

SIZE = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(SIZE, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def together(cases: list[tuple[Case, int, torch.dtype]]) -> list[Found]:
    """The mean over ranks, for each case and size of groups."""
    world, results = World(Launch.from_environment()), []
    for case, size, dtype in cases:
        model = make(dtype)
        model.state_group = divide_state(world, model.config, size, "cpu")
        mine = share(world.rank // size, world.size // size)
        found = accumulate_gradient(model, config(model, case), mine, inner_lr=0.7)
        counted = float(mine.loss_mask.any(1).sum())
        weight = counted / world.total(counted)[0]
        loss = world.total(found.loss.item() * weight)[0]
        gradients = {name: p.grad * weight for name, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        norms = [torch.empty_like(found.inner_grad_norm) for _ in range(SIZE)]
        dist.all_gather(norms, found.inner_grad_norm)
        results.append(Found(gradients, loss, torch.cat(norms[::size])))
    return results


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [*((case, 2) for case in ESSENTIAL), (Case("sqrt", clip=0.2, micro_batch_size=3), 4)], id="essential"
        ),
        pytest.param([*((case, 2) for case in OTHERS), (Case(), 4)], id="others", marks=pytest.mark.slow),
    ],
)
def test_the_meta_gradient_is_that_of_one_process(ranks: Ranks, cases: list[tuple[Case, int]]) -> None:
    answers = ranks.run(together, [(*case, torch.float64) for case in cases])
    for i, (case, size) in enumerate(cases):
        exact = alone(case)
        for found in (answer[i] for answer in answers):
            assert found.error(exact) <= 1e-12, (case, size)
            assert found.loss == pytest.approx(exact.loss, rel=1e-12)
            torch.testing.assert_close(found.inner_grad_norm, exact.inner_grad_norm, rtol=1e-12, atol=0)


def test_float32_errs_no_more_than_one_process(ranks: Ranks) -> None:
    case = Case("none", clip=0.2)
    exact = alone(case)
    for size, found in zip(
        (2, 4), ranks.run(together, [(case, size, torch.float32) for size in (2, 4)])[0], strict=True
    ):
        assert found.error(exact) <= NOISE * alone(case, torch.float32).error(exact), size


def test_cases_differ_from_one_another() -> None:
    """A rank that ignored schedule, clip or kind of meta-gradient would be found out."""
    exact = alone(Case("none", clip=0.05))
    for case in (
        Case("none", clip=1.0),
        Case("none", clip=0.2),
        Case(meta_gradient="first-order"),
        Case(loss="static"),
    ):
        assert alone(case).error(exact) > 1e-3


def inputs(seed: int = 0) -> list[Tensor]:
    """x, gate, up, down and a direction for the output; B 2, T 3, D 4, F 8."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 4), (2, 8, 4), (2, 8, 4), (2, 4, 8), (2, 3, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def derivatives(group: dist.ProcessGroup | None) -> list[Tensor]:
    """Value, gradients and gradients of gradients of the fast MLP; of weights the mean over ranks."""
    x, gate, up, down, direction = inputs()
    parts: list[Tensor] = [gate, up, down]
    if group is not None:  # a sequence's weights [B, ...]: hidden units are dimension 1, of `down` 2
        parts = [part(w, dim, group) for w, dim in zip(parts, (1, 1, 2), strict=True)]
    y = fast_mlp(x, *parts, group=group)
    first = torch.autograd.grad((y * direction).sum(), [x, *parts], create_graph=True)
    stepped, norm = clipped_sgd(parts, first[1:], lr=0.3, clip=1.0, group=group)
    again = fast_mlp(x, *stepped, group=group)
    total = (again * direction).sum() + first[0].square().sum()
    return [y.detach(), norm, *torch.autograd.grad(total, [x, gate, up, down, direction])]


def derivatives_together() -> list[Tensor]:
    found = derivatives(dist.group.WORLD)
    for gradient in found[3:6]:
        dist.all_reduce(gradient)
        gradient /= SIZE
    return found


def test_a_step_of_a_divided_mlp_is_differentiated_as_that_of_a_whole_one(ranks: Ranks) -> None:
    expected = derivatives(None)
    for found in ranks.run(derivatives_together):
        for mine, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


def third_derivative() -> tuple[float, bool]:
    group = dist.group.WORLD
    x = torch.tensor(float(dist.get_rank() + 1), dtype=torch.float64)
    same = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = leave(x * enter(same, group) ** 3, group)
    for _ in range(3):
        (y,) = torch.autograd.grad(y, same, create_graph=True)
    return y.item(), y.requires_grad


def test_sums_over_ranks_are_differentiable_as_often_as_wanted(ranks: Ranks) -> None:
    assert [found[0] for found in ranks.run(third_derivative)] == [6.0 * (1 + 2 + 3 + 4)] * SIZE


def refusals() -> list[str]:
    world, said = World(Launch.from_environment()), []
    model = tiny.config(fast_hidden=10)
    group = divide_state(world, model, 2, "cpu")
    for attempt in (
        lambda: divide_state(world, model, 4, "cpu"),
        lambda: divide_state(world, tiny.config(fast_hidden=24), 3, "cpu"),
        lambda: divide_state(world, tiny.config(num_suffix_blocks=0), 2, "cpu"),
        lambda: divide_state(world, model, 2, "cuda"),
        lambda: InnerOptimizer(lambda w, g, *, lr, clip: w).step([], [], lr=0.1, clip=None, group=group),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        said.append(str(caught.value))
    return said


def test_what_does_not_divide_is_refused(ranks: Ranks) -> None:
    units, machine, nothing, gloo, rule = ranks.run(refusals)[0]
    assert units == "the fast MLPs have 10 hidden units; parallelism.state is 4, use a divisor of that"
    assert machine == "a machine has 4 ranks; parallelism.state is 3, use a divisor of that"
    assert "no fast weights" in nothing
    assert "NCCL" in gloo
    assert "parallelism.state 1" in rule


def test_one_rank_is_a_group_of_its_own() -> None:
    assert divide_state(World(), tiny.config(), 1, "cpu") is None
