"""The episode of one board in training: an agent acts at once, thinks, and acts again; and the loss of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longread.thinking.agent import ACTING, MENTAL, EncodedBoards, PlasticAgent, Trial
from longread.thinking.config import ThinkingConfig
from longread.thinking.draws import Draws
from longread.thinking.memory import Fast
from longread.thinking.recurrent import RecurrentAgent
from longread.thinking.trials import Known
from longread.thinking.world import DROPS, MarbleWorld

Agent = PlasticAgent | RecurrentAgent


def make_agent(world: MarbleWorld, draws: Draws, config: ThinkingConfig) -> Agent:
    """The agents of a config, as many as there are streams of draws."""
    kind = PlasticAgent if config.agent == "plastic" else RecurrentAgent
    return kind(world, draws.of("agent"), config).to(world.device)


class Episode(NamedTuple):
    """Trials of N copies on each of B boards."""

    before: Trial
    """Acting at once, K = 0."""
    mental: list[Trial]
    after: Trial


def thinking(
    agent: Agent, task: EncodedBoards, fast: Fast, known: Known, draws: Draws, shape: tuple[int, ...], *, trials: int
) -> Iterator[tuple[Trial, Fast]]:
    """Mental trials one after the other, each with the fast weights that it leaves.

    Args:
        known: what comes of a plan, in the world or in a model of it.
        shape: B boards, N copies, D marbles.
    """
    for number in range(trials):
        trial, fast = agent.trial(task, fast, MENTAL, known, draws.of("mental", number).uniform(*shape))
        fast = agent.learn(task, fast, trial)
        yield trial, fast


def episode(agent: Agent, cells: Tensor, known: Known, draws: Draws, config: ThinkingConfig) -> Episode:
    """An episode on boards [S, B, P]; fast weights begin at the same place before and after."""
    task = agent.view(cells)
    shape = (cells.shape[1], config.copies, DROPS)
    fast = agent.begin(task, config.copies)
    before, _ = agent.trial(task, fast, ACTING, known, draws.of("before").uniform(*shape))
    if config.swapped_share:
        swapped = draws.of("swapped").uniform(cells.shape[1]) < config.swapped_share
        others = task.slow.detach().roll(1, 1)
        task = task._replace(slow=torch.where(swapped[..., None, None], others, task.slow))
    mental = []
    for trial, after_it in thinking(agent, task, fast, known, draws, shape, trials=config.trials):
        mental.append(trial)
        fast = after_it
    after, _ = agent.trial(task, fast, ACTING, known, draws.of("after").uniform(*shape))
    return Episode(before, mental, after)


def objective(found: Episode, config: ThinkingConfig, entropy_weight: float) -> Tensor:
    """The loss of an episode for each of S agents: [S].

    − A_pre log π(pre) − Σ_k (A_post + w A_k) log π(mental k) − A_post log π(post) − entropy + consolidation

    A is success less the mean success of the other copies. Consolidation is the cross-entropy of the policy before
    thinking towards the last winning plan that the copy has found: slow weights learn what thinking found.
    """
    post = advantage(found.after)
    losses = -advantage(found.before) * found.before.log_likelihood(found.before.plan)
    losses = losses - post * found.after.log_likelihood(found.after.plan)
    entropy = found.before.entropy + found.after.entropy
    plan, won = found.before.plan, torch.zeros_like(found.before.success)
    for trial in found.mental:
        losses = losses - (post + config.trial_weight * advantage(trial)) * trial.log_likelihood(trial.plan)
        entropy = entropy + trial.entropy
        plan, won = torch.where(trial.success[..., None], trial.plan, plan), won | trial.success
    consolidation = torch.where(won, -found.before.log_likelihood(plan), 0.0)
    return (losses - entropy_weight * entropy + config.consolidation * consolidation).mean((1, 2))


def advantage(trial: Trial) -> Tensor:
    """Success less the mean of the other copies on the same board: [S, B, N]."""
    reward = trial.success.to(trial.log_policy.dtype)
    others = (reward.sum(-1, keepdim=True) - reward) / (reward.shape[-1] - 1)
    return reward - others
