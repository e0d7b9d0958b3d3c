"""The agent: acts on a board at once, or thinks first, by trials that change its fast weights for this board alone.

    π_d = softmax(τ_phase (slow_d + z_d))        z: what the fast weights add (longread.thinking.memory)

After each mental trial with reward R, a_d = R η_d⁺ − (1 − R) η_d⁻ is the rate of the inner step, and a network sees the
trial and gives the teaching signal v_d: a vector over actions, so that a near miss can favour one not yet tried.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longread.thinking.config import ThinkingConfig
from longread.thinking.draws import Draws, choose
from longread.thinking.layers import EnsembleLinear, one_hot
from longread.thinking.memory import Fast, LinearMemory, MLPMemory
from longread.thinking.trials import Known
from longread.thinking.world import DROPS, MarbleWorld

MENTAL, ACTING = 0, 1
"""Phases: a trial to learn from, and the one that counts."""
TEACHING_SCALE = 3.0


class EncodedBoards(NamedTuple):
    """B boards as S agents see them before any trial."""

    slow: Tensor
    """Logits, [S, B, D, A]."""
    key: Tensor
    """[S, B, W], of length 1."""
    targets: Tensor
    """One-hot columns of key and goal, [S, B, D · A]."""


class Trial(NamedTuple):
    """One trial of each of N copies on each of B boards."""

    plan: Tensor
    """[S, B, N, D]"""
    log_policy: Tensor
    """Of every action, [S, B, N, D, A]."""
    positions: Tensor
    """Last positions, [S, B, N, D]."""
    success: Tensor
    """[S, B, N], bool."""

    @property
    def policy(self) -> Tensor:
        return self.log_policy.exp()

    @property
    def entropy(self) -> Tensor:
        """Over both marbles, [S, B, N]."""
        return -(self.policy * self.log_policy).sum((-1, -2))

    def log_likelihood(self, plan: Tensor) -> Tensor:
        """log π of plans [S, B, N, D]: [S, B, N]."""
        return self.log_policy.gather(-1, plan[..., None])[..., 0].sum(-1)


class PlasticAgent(nn.Module):
    """S agents of one shape."""

    def __init__(self, world: MarbleWorld, draws: Draws, config: ThinkingConfig) -> None:
        super().__init__()
        self.world, self.teach = world, config.teach
        A, width = world.actions, config.width
        self.first = EnsembleLinear(draws.of("first"), world.cells * world.kinds, width)
        self.second = EnsembleLinear(draws.of("second"), width, width)
        self.slow = EnsembleLinear(draws.of("slow"), width, DROPS * A)
        self.key = EnsembleLinear(draws.of("key"), width, config.key_width)
        memory = LinearMemory if config.memory == "linear" else MLPMemory
        self.memory = memory(draws.of("memory"), A, config.key_width)
        like = self.slow.bias
        self.log_scale = nn.Parameter(like.new_zeros(draws.count, 2))
        self.log_rate = nn.Parameter(like.new_ones(draws.count, DROPS, 2))
        if self.teach != "off":
            seen = config.key_width + DROPS * (world.cells + 3 * A) + 1
            self.teacher = EnsembleLinear(draws.of("teacher"), seen, config.teacher_width)
            signal = DROPS * (A if self.teach == "vector" else 1)
            self.signal = EnsembleLinear(draws.of("signal"), config.teacher_width, signal, zero=True)

    def view(self, cells: Tensor) -> EncodedBoards:
        """Looks at boards [S, B, P]."""
        hidden = torch.relu(self.first(one_hot(cells, self.world.kinds).flatten(-2)))
        hidden = torch.relu(self.second(hidden))
        slow = self.slow(hidden).unflatten(-1, (DROPS, self.world.actions))
        targets = one_hot(self.world.targets(cells), self.world.actions).flatten(-2)
        return EncodedBoards(slow, nn.functional.normalize(self.key(hidden), dim=-1), targets)

    def begin(self, task: EncodedBoards, copies: int) -> Fast:
        """The fast weights before any trial."""
        return self.memory.begin(task.key, copies)

    def logits(self, task: EncodedBoards, fast: Fast, phase: int) -> Tensor:
        """τ (slow + z): [S, B, N, D, A]"""
        return self._scale(phase) * (task.slow[:, :, None] + self.memory.read(fast, task.key))

    def trial(self, task: EncodedBoards, fast: Fast, phase: int, known: Known, uniform: Tensor) -> tuple[Trial, Fast]:
        """Draws a plan by `uniform` [S, B, N, D] and looks up what comes of it; the fast weights stay as they are."""
        log_policy = torch.log_softmax(self.logits(task, fast, phase), -1)
        plan = choose(log_policy.exp(), uniform)
        return Trial(plan, log_policy, *known.of(plan)), fast

    def learn(self, task: EncodedBoards, fast: Fast, trial: Trial) -> Fast:
        """The inner step after a mental trial."""
        chosen = one_hot(trial.plan, self.world.actions)
        reward = trial.success.to(chosen.dtype)
        up, down = self.log_rate.exp()[:, None, None].unbind(-1)
        rate = (reward[..., None] * up - (1 - reward[..., None]) * down)[..., None]
        return self.memory.step(
            fast,
            task.key,
            policy=trial.policy,
            slow=task.slow[:, :, None],
            scale=self._scale(MENTAL),
            chosen=chosen,
            rate=rate,
            teaching=self._teaching(task, trial, chosen, reward),
        )

    def _teaching(self, task: EncodedBoards, trial: Trial, chosen: Tensor, reward: Tensor) -> Tensor:
        if self.teach == "off":
            return torch.zeros_like(chosen)
        A, copies = self.world.actions, trial.plan.shape[2]
        moved = (trial.positions % A - trial.plan) % A
        seen = [
            task.key[:, :, None].expand(-1, -1, copies, -1),
            one_hot(trial.positions, self.world.cells).flatten(-2),
            chosen.flatten(-2),
            one_hot(moved, A).flatten(-2),
            reward[..., None],
            task.targets[:, :, None].expand(-1, -1, copies, -1),
        ]
        signal = TEACHING_SCALE * self.signal(torch.relu(self.teacher(torch.cat(seen, -1))))
        signal = signal.unflatten(-1, (DROPS, -1))
        return signal if self.teach == "vector" else signal * (chosen - trial.policy)

    def _scale(self, phase: int) -> Tensor:
        return self.log_scale[:, phase].exp()[:, None, None, None, None]
