"""The inner step of thinking agents, its meta-gradient, and what an evaluation may and may not know."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.ops.fast_mlp.reference import reference_fast_mlp
from longread.thinking import (
    Cohort,
    MarbleWorld,
    ModelTraining,
    ThinkingConfig,
    WorldConfig,
    certified_set,
    conditions as tested,
)
from longread.thinking.agent import ACTING, MENTAL, PlasticAgent
from longread.thinking.conditions import AT_ONCE, CONDITIONS, MODEL, SIMULATOR, evaluate_agents
from longread.thinking.draws import Draws
from longread.thinking.episode import advantage, episode, make_agent, objective
from longread.thinking.memory import LinearMemory, MLPMemory
from longread.thinking.tasks import draw_legal, rule
from longread.thinking.trials import Outcomes, outcomes
from longread.thinking.world_model import WorldModel

SMALL = ThinkingConfig(width=16, key_width=8, teacher_width=12, boards=3, copies=4, trials=2, population=40)
WORLD = MarbleWorld(WorldConfig())
KINDS = [
    {"memory": "linear"},
    {"memory": "linear", "teach": "scalar"},
    {"memory": "linear", "teach": "off"},
    {"memory": "fast_mlp"},
    {"agent": "recurrent"},
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.set_default_dtype(torch.float64)


def boards(seeds: int, count: int) -> tuple[Tensor, Outcomes]:
    cells = draw_legal(WORLD, Draws.from_seeds(range(seeds)), rule(WORLD, ["abc"] * seeds), count)
    return cells, outcomes(WORLD, WORLD.step, cells)


def agent_of(seeds: int = 2, **kind: Any) -> Any:
    """With weights that are nowhere zero, so that nothing is switched off."""
    agent = make_agent(WORLD, Draws.from_seeds(range(seeds)), dataclasses.replace(SMALL, **kind))
    draws = Draws.from_seeds(range(seeds)).of("jitter")
    with torch.no_grad():
        for name, weight in agent.named_parameters():
            weight += 0.2 * (draws.of(name).uniform(*weight.shape[1:]) - 0.5)
    return agent


def some_trial(agent: Any, copies: int = 4) -> tuple[Any, ...]:
    cells, known = boards(2, 3)
    task = agent.view(cells)
    fast = agent.begin(task, copies)
    uniform = Draws.from_seeds([0, 1]).of("trial").uniform(3, copies, 2)
    trial, fast = agent.trial(task, fast, MENTAL, known, uniform)
    return task, fast, trial


def test_without_teaching_the_step_is_sgd_on_the_log_likelihood_of_the_trial() -> None:
    agent = agent_of(teach="off")
    task, (F,), _ = some_trial(agent)
    F = torch.randn_like(F).requires_grad_()
    _, known = boards(2, 3)
    trial, _ = agent.trial(task, (F,), MENTAL, known, Draws.from_seeds([5, 6]).uniform(3, 4, 2))
    up, down = agent.log_rate.exp().unbind(-1)
    reward = trial.success.double()
    rate = reward[..., None] * up[:, None, None] - (1 - reward[..., None]) * down[:, None, None]
    of_plan = trial.log_policy.gather(-1, trial.plan[..., None])[..., 0]
    (gradient,) = torch.autograd.grad(-(rate * of_plan).sum(), F, retain_graph=True)
    (stepped,) = agent.learn(task, (F,), trial)
    torch.testing.assert_close(stepped, F - gradient, rtol=1e-12, atol=1e-12)


def test_the_fast_mlp_takes_the_clipped_step_of_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(memory="fast_mlp")
    task, fast, trial = some_trial(agent)
    gate, up, down = (w.detach().clone().requires_grad_() for w in fast)
    x = task.key[:, :, None].expand(-1, -1, 4, -1).reshape(-1, 1, 8)
    z = agent.memory.readout(reference_fast_mlp(x, gate, up, down).view(2, 3, 4, 8)).unflatten(-1, (2, 5))
    log_policy = torch.log_softmax(
        agent.log_scale[:, 0].exp()[:, None, None, None, None] * (task.slow[:, :, None] + z), -1
    )
    torch.testing.assert_close(log_policy, trial.log_policy)
    chosen = torch.nn.functional.one_hot(trial.plan, 5).double()
    reward = trial.success.double()[..., None]
    plus, minus = agent.log_rate.exp()[:, None, None].unbind(-1)
    rate = (reward * plus - (1 - reward) * minus)[..., None]
    teaching = agent._teaching(task, trial, chosen, trial.success.double())
    loss = -(rate * chosen * log_policy).sum() - (teaching * z).sum()
    gradients = torch.autograd.grad(loss, (gate, up, down))
    norm = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
    longest = norm.median().item()
    monkeypatch.setattr("longread.thinking.memory.LONGEST_STEP", longest)
    factor = (longest / norm).clamp(max=1)[:, None, None]
    assert (factor < 1).any()
    assert (factor == 1).any()
    for new, old, gradient in zip(agent.learn(task, fast, trial), fast, gradients, strict=True):
        torch.testing.assert_close(new, old - factor * gradient, rtol=1e-10, atol=1e-12)


@each_kind
def test_the_meta_gradient_is_the_finite_difference(kind: dict[str, str]) -> None:
    """Through all inner steps; what is drawn does not change with a change of 1e-6."""
    config = dataclasses.replace(SMALL, **kind)
    agent, (cells, known) = agent_of(**kind), boards(2, 3)

    def loss() -> Tensor:
        return objective(episode(agent, cells, known, Draws.from_seeds([3, 4]), config), config, 0.03)

    loss().sum().backward()
    checked = 0
    for name, weight in agent.named_parameters():
        index = tuple(int(i) for i in (weight.grad.abs() == weight.grad.abs().max()).nonzero()[0])
        before, found = weight[index].item(), weight.grad[index].item()
        ends = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                weight[index] = before + change
                ends.append(loss().sum().item())
                weight[index] = before
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-4, abs=1e-7), name
        checked += found != 0
    assert checked >= 10


@each_kind
def test_agents_do_not_see_each_other(kind: dict[str, str]) -> None:
    agent, (cells, known) = agent_of(**kind), boards(2, 3)
    config = dataclasses.replace(SMALL, **kind)
    objective(episode(agent, cells, known, Draws.from_seeds([3, 4]), config), config, 0.03)[1].backward()
    for name, weight in agent.named_parameters():
        if weight.grad is not None:
            assert weight.grad[0].abs().max() == 0, name
            assert weight.grad[1].abs().max() > 0, name


@each_kind
def test_acting_at_once_is_not_changed_by_thinking(kind: dict[str, str]) -> None:
    config = dataclasses.replace(SMALL, **kind)
    agent, (cells, known) = agent_of(**kind), boards(2, 3)
    draws = Draws.from_seeds([0, 1])
    thought = episode(agent, cells, known, draws, config)
    at_once = episode(agent, cells, known, draws, dataclasses.replace(config, trials=0))
    assert torch.equal(thought.before.log_policy, at_once.before.log_policy)
    before, after = at_once.before.log_policy, at_once.after.log_policy
    torch.testing.assert_close(after[..., 0, :], before[..., 0, :])  # a GRU's second action sees where the first led
    assert not torch.allclose(thought.after.log_policy[..., 0, :], thought.before.log_policy[..., 0, :])


def test_fast_weights_begin_at_nothing_and_the_policy_at_the_slow_logits() -> None:
    agent = agent_of()
    task, fast, _ = some_trial(agent)
    assert fast[0].abs().max() == 0
    scale = agent.log_scale[:, ACTING].exp()[:, None, None, None, None]
    torch.testing.assert_close(
        agent.logits(task, fast, ACTING), (scale * task.slow[:, :, None]).expand(-1, -1, 4, -1, -1)
    )
    assert isinstance(agent.memory, LinearMemory)
    assert isinstance(agent_of(memory="fast_mlp").memory, MLPMemory)


def test_an_advantage_is_over_the_other_copies() -> None:
    agent = agent_of()
    _, _, trial = some_trial(agent)
    success = torch.tensor([True, False, False, True])
    found = advantage(trial._replace(success=success.expand(2, 3, 4)))
    assert found[1, 2].tolist() == pytest.approx([1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3])


class Perfect(WorldModel):
    """A world model that is right."""

    def step(self, cells: Tensor, marble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.world.step(cells, marble)


def test_a_perfect_model_is_as_good_as_the_simulator_bit_for_bit() -> None:
    agent, boards_ = agent_of(), certified_set(WORLD, "abc", 20)
    model = Perfect(WORLD, Draws.from_seeds([0, 1]), 4)
    found = evaluate_agents(WORLD, agent, model, boards_, Draws.from_seeds([0, 1]), curve=3, trials=3)
    assert torch.equal(found.success[MODEL], found.success[SIMULATOR])
    assert found.quality.recall.tolist() == found.quality.precision.tolist() == [1.0, 1.0]
    assert found.by_trials is not None
    assert torch.equal(found.by_trials[:, 0], found.success[AT_ONCE])
    assert torch.equal(found.by_trials[:, 3], found.success[MODEL])
    assert found.success["exhaustive search in its world model"].tolist() == [1.0, 1.0]
    without = evaluate_agents(WORLD, agent, None, boards_, Draws.from_seeds([0, 1]), conditions=[MODEL], trials=3)
    assert torch.equal(without.success[MODEL], found.success[MODEL])


def test_the_real_world_is_asked_for_one_trial_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, boards_ = agent_of(), certified_set(WORLD, "abc", 4)
    model = WorldModel(WORLD, Draws.from_seeds([0, 1]), 4)
    dropped, step = [0], MarbleWorld.step

    def counted(self: MarbleWorld, cells: Tensor, marble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dropped[0] += int((marble < 25).sum())  # marbles in the top row
        return step(self, cells, marble)

    monkeypatch.setattr(MarbleWorld, "step", counted)
    found = evaluate_agents(WORLD, agent, model, boards_, Draws.from_seeds([0, 1]), tries=3, trials=2)
    each = 2 * 4 * 3 * 2  # agents, boards, tries, marbles
    assert found.drops == dict.fromkeys(CONDITIONS, each)
    assert dropped[0] == each * len(CONDITIONS)


def test_controls_change_what_they_say() -> None:
    agent, boards_ = agent_of(), certified_set(WORLD, "abc", 12)
    draws = Draws.from_seeds([0, 1])
    cells = boards_.cells.expand(2, -1, -1)
    known = outcomes(WORLD, WORLD.step, cells)
    bench = tested._Bench(WORLD, agent, cells, known, known, draws, 4, 4, 4)
    plans = {name: bench.plans(name) for name in CONDITIONS}
    assert torch.equal(plans[MODEL], plans[SIMULATOR])
    for name in CONDITIONS:
        if name != MODEL and name != SIMULATOR:
            assert not torch.equal(plans[name], plans[MODEL]), name
    reached = known.of(plans["random shooting in its world model"])[1].double().mean()
    assert reached.item() == pytest.approx(1 - (1 - boards_.chance) ** 4 * (1 - boards_.chance), abs=0.15)


def test_the_reasoner_shifts_every_column_as_the_one_that_it_has_tried() -> None:
    world = MarbleWorld(WorldConfig())
    found = evaluate_agents(
        world, agent_of(), Perfect(world, Draws.from_seeds([0, 1]), 4), certified_set(world, "abc", 400),
        Draws.from_seeds([0, 1]), conditions=[CONDITIONS[-1]],
    )  # fmt: skip
    assert found.success[CONDITIONS[-1]].mean().item() == pytest.approx(0.85, abs=0.03)


@pytest.mark.parametrize(
    "kind",
    [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in (KINDS[3], KINDS[4]))],
    ids=lambda kind: "-".join(kind.values()),
)
def test_many_agents_train_as_each_does_alone(kind: dict[str, str]) -> None:
    model = ModelTraining(steps=2, batch_size=8, width=4, boards=20, renew_every=1)
    config = dataclasses.replace(SMALL, world_model=model, iterations=3, warmup=2, selection="gap_unsolved", **kind)
    names = ["abc", "abd"]
    together = Cohort(config, seeds=[4, 5], withheld=names)
    alone = [Cohort(config, seeds=[seed], withheld=[name]) for seed, name in zip([4, 5], names, strict=True)]
    for _ in range(together.steps):
        rows = [each.advance() for each in alone]
        row = together.advance()
        for name, values in row.items():
            assert values == pytest.approx([each[name][0] for each in rows], rel=1e-9, abs=1e-12), name
    found = together.tensors()
    for s, each in enumerate(alone):
        for name, value in each.tensors().items():
            other = found[name] if name.startswith("step.") else found[name][s : s + 1]
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)


def test_the_plastic_agent_is_the_default() -> None:
    assert isinstance(make_agent(WORLD, Draws.from_seeds([0]), SMALL), PlasticAgent)
