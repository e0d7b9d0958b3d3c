"""The ablation: an agent without fast weights, whose memory of its trials is the state of a GRU."""

from __future__ import annotations

import torch
from torch import Tensor

from longread.thinking.agent import EncodedBoards, Trial
from longread.thinking.config import ThinkingConfig
from longread.thinking.draws import Draws, choose
from longread.thinking.layers import EnsembleLinear, one_hot
from longread.thinking.memory import Fast
from longread.thinking.trials import Known
from longread.thinking.world import DROPS, MarbleWorld


class RecurrentAgent(torch.nn.Module):
    """S agents: the same encoder, then a GRU over board, last action, last landing, reward, phase and marble.

    It is called as `PlasticAgent`; its "fast weights" are the state [S, B, N, width]. A trial changes it, `learn` shows
    it the reward.
    """

    def __init__(self, world: MarbleWorld, draws: Draws, config: ThinkingConfig) -> None:
        super().__init__()
        self.world, self.width = world, config.width
        A, width = world.actions, config.width
        self.first = EnsembleLinear(draws.of("first"), world.cells * world.kinds, width)
        self.second = EnsembleLinear(draws.of("second"), width, width)
        seen = width + A + world.cells + 1 + 2 + DROPS + 1
        self.inputs = EnsembleLinear(draws.of("inputs"), seen, 3 * width)
        self.recurrence = EnsembleLinear(draws.of("recurrence"), width, 3 * width)
        self.slow = EnsembleLinear(draws.of("slow"), width, A)

    def view(self, cells: Tensor) -> EncodedBoards:
        """Looks at boards [S, B, P]; the task's key is what the encoder made of them."""
        hidden = torch.relu(self.first(one_hot(cells, self.world.kinds).flatten(-2)))
        hidden = torch.relu(self.second(hidden))
        empty = hidden.new_zeros(*hidden.shape[:2], DROPS, self.world.actions)
        return EncodedBoards(empty, hidden, one_hot(self.world.targets(cells), self.world.actions).flatten(-2))

    def begin(self, task: EncodedBoards, copies: int) -> Fast:
        """The state before any trial."""
        return (task.key.new_zeros(*task.key.shape[:2], copies, self.width),)

    def trial(self, task: EncodedBoards, fast: Fast, phase: int, known: Known, uniform: Tensor) -> tuple[Trial, Fast]:
        """Draws marble after marble: the second action sees where the first marble landed."""
        (state,), A, cells = fast, self.world.actions, self.world.cells
        lead = uniform.shape[:-1]
        action, landing = uniform.new_full(lead, A).long(), uniform.new_full(lead, cells).long()
        reward = state.new_zeros(*lead, 1)
        plan: list[Tensor] = []
        log_policies = []
        for number in range(DROPS):
            state = self._advance(task, state, action, landing, reward, phase, number)
            log_policies.append(torch.log_softmax(self.slow(state), -1))
            action = choose(log_policies[-1].exp(), uniform[..., number])
            plan.append(action)
            both = torch.stack([plan[0], action], -1)
            landing = known.of(both)[0][..., number]
        chosen = torch.stack(plan, -1)
        return Trial(chosen, torch.stack(log_policies, -2), *known.of(chosen)), (state,)

    def learn(self, task: EncodedBoards, fast: Fast, trial: Trial) -> Fast:
        """Sees how the trial ended."""
        reward = trial.success.to(fast[0].dtype)
        last, landing = trial.plan[..., -1], trial.positions[..., -1]
        return (self._advance(task, fast[0], last, landing, reward[..., None], 0, DROPS),)

    def _advance(
        self,
        task: EncodedBoards,
        state: Tensor,
        action: Tensor,
        landing: Tensor,
        reward: Tensor,
        phase: int,
        number: int,
    ) -> Tensor:
        """One step of the GRU (Cho et al., 2014); `number` DROPS: the trial is over."""
        lead = state.shape[:-1]
        facts = state.new_zeros(2 + DROPS + 1)
        facts[phase] = facts[2 + number] = 1.0
        seen = [
            task.key[:, :, None].expand(*lead, -1),
            one_hot(action, self.world.actions),
            one_hot(landing, self.world.cells),
            reward,
            facts.expand(*lead, -1),
        ]
        update, reset, new = self.inputs(torch.cat(seen, -1)).chunk(3, -1)
        was_update, was_reset, was_new = self.recurrence(state).chunk(3, -1)
        update = torch.sigmoid(update + was_update)
        new = torch.tanh(new + torch.sigmoid(reset + was_reset) * was_new)
        return update * state + (1 - update) * new
