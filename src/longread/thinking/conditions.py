"""How well agents act on boards of a combination: at once, after thinking, and under the controls.

Every figure is the success of ONE real trial of a board. Thinking happens in a world model; the real simulator is asked
for the trial that counts and for nothing else, which `RealTrials.drops` counts. "In the simulator" is the control with
a perfect model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longread.thinking.agent import ACTING, MENTAL, EncodedBoards, Trial
from longread.thinking.draws import Draws, choose
from longread.thinking.episode import Agent
from longread.thinking.memory import Fast
from longread.thinking.tasks import CertifiedSet
from longread.thinking.trials import Outcomes, outcomes, play
from longread.thinking.world import DROPS, MarbleWorld
from longread.thinking.world_model import WorldModel

AT_ONCE = "acts at once"
MODEL = "thinks in its world model"
SIMULATOR = "thinks in the simulator"
UNTRAINED = "thinks in an untrained model"
ANOTHER = "thinks about another board"
NO_REWARD = "imagined rewards zeroed"
RANDOM_LANDINGS = "imagined landings random"
SHOOTING = "random shooting in its world model"
SEARCH = "exhaustive search in its world model"
REASONER = "hand-written reasoner, one imagined trial"
CONDITIONS = (
    AT_ONCE, MODEL, SIMULATOR, UNTRAINED, ANOTHER, NO_REWARD, RANDOM_LANDINGS, SHOOTING, SEARCH, REASONER
)  # fmt: skip


@dataclass
class RealTrials:
    """The real simulator, as one that acts meets it: boards, one trial each, and a count of what was asked."""

    world: MarbleWorld
    cells: Tensor
    """[S, B, P]"""
    drops: int = 0

    def success(self, plan: Tensor) -> Tensor:
        """Plays plans [S, B, N, D], each on a board as it was at first: [S, B, N]."""
        self.drops += plan.numel()
        cells = self.cells[:, :, None].expand(*plan.shape[:-1], -1)
        return play(self.world, self.world.step, cells, plan)[1]


class Quality(NamedTuple):
    """How well a model knows which plans win, over all plans of the boards: each [S]."""

    recall: Tensor
    precision: Tensor


@dataclass
class BoardEvaluation:
    """Success of S agents on the boards of one combination."""

    families: str
    boards: int
    tries: int
    """Copies that try each board, each for itself."""
    trials: int
    """K"""
    sha256: str
    """Of the boards."""
    chance: float
    quality: Quality
    success: dict[str, Tensor] = field(default_factory=dict)
    """By condition, [S]."""
    by_trials: Tensor | None = None
    """Success after 0 … K mental trials in the world model, [S, K + 1]."""
    drops: dict[str, int] = field(default_factory=dict)
    """Real drops by condition, over all agents."""


@torch.no_grad()
def evaluate_agents(
    world: MarbleWorld,
    agent: Agent,
    model: WorldModel | None,
    boards: CertifiedSet,
    draws: Draws,
    *,
    trials: int = 8,
    tries: int = 4,
    conditions: Sequence[str] = CONDITIONS,
    curve: int | None = None,
) -> BoardEvaluation:
    """Evaluates S agents, each with its own world model.

    Args:
        model: None: the simulator stands in for it.
        draws: of S streams; agents of equal streams see equal luck.
        conditions: names from `CONDITIONS`.
        curve: also success after each number of mental trials up to this one.
    """
    seeds = draws.count
    cells = boards.cells.expand(seeds, -1, -1)
    real = Outcomes(*(entry.expand(seeds, *entry.shape) for entry in boards.outcomes))
    imagined = real if model is None else imagine(world, model, boards.cells, seeds)
    draws = draws.of("evaluation", boards.families)
    found = BoardEvaluation(
        boards.families, len(boards.cells), tries, trials, boards.sha256, boards.chance, quality(imagined, real)
    )
    bench = _Bench(world, agent, cells, imagined, real, draws, trials, tries, 1 if model is None else model.width)
    for name in conditions:
        plan = bench.plans(name)
        trial = RealTrials(world, cells)
        found.success[name] = trial.success(plan).double().mean((1, 2))
        found.drops[name] = trial.drops
    if curve is not None:
        found.by_trials = bench.curve(curve)
    return found


def imagine(world: MarbleWorld, model: WorldModel, cells: Tensor, seeds: int) -> Outcomes:
    """The outcome of every plan by S models on boards [B, P]; boards that occur twice are asked about once."""
    different, place = cells.unique(dim=0, return_inverse=True)
    found = outcomes(world, model.step, different.expand(seeds, -1, -1))
    return found.select(place.expand(seeds, -1))


def quality(imagined: Outcomes, real: Outcomes) -> Quality:
    """Recall and precision of winning plans, [S] each; without a plan that is said to win, precision is 0."""
    said, true = imagined.success.flatten(1), real.success.flatten(1)
    both = (said & true).sum(1).double()
    return Quality(both / true.sum(1).clamp(min=1), both / said.sum(1).clamp(min=1))


@dataclass
class _Bench:
    """The common parts of all conditions."""

    world: MarbleWorld
    agent: Agent
    cells: Tensor
    imagined: Outcomes
    real: Outcomes
    draws: Draws
    trials: int
    tries: int
    width: int
    """Of the world models."""

    def plans(self, condition: str) -> Tensor:
        """The plans that are tried in the real world under a condition: [S, B, N, D]."""
        if condition == AT_ONCE:
            return self.acts(*self.begins())
        if condition == UNTRAINED:
            untrained = WorldModel(self.world, self.draws.of("untrained"), self.width).to(self.cells.device)
            known = imagine(self.world, untrained, self.cells[0], len(self.cells))
            return self.thinks(known)
        special: dict[str, Callable[[], Tensor]] = {
            MODEL: lambda: self.thinks(self.imagined),
            SIMULATOR: lambda: self.thinks(self.real),
            ANOTHER: self._about_another_board,
            NO_REWARD: lambda: self.thinks(
                self.imagined, lambda trial, _: trial._replace(success=trial.success & False)
            ),
            RANDOM_LANDINGS: lambda: self.thinks(self.imagined, self._landing_anywhere),
            SHOOTING: self._shoots,
            SEARCH: self._searches,
            REASONER: self._reasons,
        }
        return special[condition]()

    def begins(self) -> tuple[EncodedBoards, Fast]:
        task = self.agent.view(self.cells)
        return task, self.agent.begin(task, self.tries)

    def acts(self, task: EncodedBoards, fast: Fast) -> Tensor:
        """The plan of the trial that counts; an agent may see where its first marble really fell before the second."""
        return self.agent.trial(task, fast, ACTING, self.real, self._uniform("act"))[0].plan

    def after(
        self, task: EncodedBoards, known: Outcomes, trials: int, change: Callable[[Trial, Draws], Trial] | None = None
    ) -> Iterable[Fast]:
        """The fast weights before and after each mental trial."""
        fast = self.agent.begin(task, self.tries)
        yield fast
        for number in range(trials):
            trial, fast = self.agent.trial(task, fast, MENTAL, known, self._uniform("mental", number))
            seen = trial if change is None else change(trial, self.draws.of("change", number))
            fast = self.agent.learn(task, fast, seen)
            yield fast

    def thinks(self, known: Outcomes, change: Callable[[Trial, Draws], Trial] | None = None) -> Tensor:
        task = self.agent.view(self.cells)
        *_, fast = self.after(task, known, self.trials, change)
        return self.acts(task, fast)

    def curve(self, most: int) -> Tensor:
        task, real = self.agent.view(self.cells), RealTrials(self.world, self.cells)
        found = [real.success(self.acts(task, fast)) for fast in self.after(task, self.imagined, most)]
        return torch.stack([success.double().mean((1, 2)) for success in found], 1)

    def _about_another_board(self) -> Tensor:
        other = self.agent.view(self.cells.roll(1, 1))
        *_, fast = self.after(other, Outcomes(*(entry.roll(1, 1) for entry in self.imagined)), self.trials)
        return self.acts(self.agent.view(self.cells), fast)

    def _landing_anywhere(self, trial: Trial, draws: Draws) -> Trial:
        column = draws.integers(self.world.columns, *trial.positions.shape[1:])
        return trial._replace(positions=trial.positions - trial.positions % self.world.columns + column)

    def _shoots(self) -> Tensor:
        """Plans at random, the first that wins in the model is taken; the last one if none does."""
        A = self.world.actions
        plan = self.draws.of("shoot", self.trials).integers(A, *self._shape)
        for number in reversed(range(self.trials)):
            tried = self.draws.of("shoot", number).integers(A, *self._shape)
            plan = torch.where(self.imagined.of(tried)[1][..., None], tried, plan)
        return plan

    def _searches(self) -> Tensor:
        """One of the plans that win in the model, any plan if there is none."""
        wins = self.imagined.success.flatten(-2).double()
        wins = torch.where(wins.sum(-1, keepdim=True) > 0, wins, 1.0)
        uniform = self.draws.of("search").uniform(*self._shape[:2])
        number = choose((wins / wins.sum(-1, keepdim=True))[:, :, None].expand(-1, -1, self.tries, -1), uniform)
        return torch.stack([number // self.world.actions, number % self.world.actions], -1)

    def _reasons(self) -> Tensor:
        """One random imagined trial; then as if every column shifted a marble as far as the one that was tried."""
        A = self.world.actions
        plan = self.draws.of("probe").integers(A, *self._shape)
        moved = self.imagined.of(plan)[0] % A - plan
        return (self.world.targets(self.cells)[:, :, None] - moved) % A

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.cells.shape[1], self.tries, DROPS)

    def _uniform(self, *purpose: str | int) -> Tensor:
        return self.draws.of(*purpose).uniform(*self._shape)
