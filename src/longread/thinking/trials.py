"""Trials: two marbles, one after the other; played step by step, or looked up in a table of all of them.

Everything here takes the dynamics as a function `step`, so the world and a model of it are used alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longread.thinking.world import DROPS, MarbleWorld

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""cells [..., P], marble [...] -> the same afterwards, and success [...]: `MarbleWorld.step`, or that of a model."""


class Landing(NamedTuple):
    """How a marble ended."""

    cells: Tensor
    position: Tensor
    """The last cell that it was in."""
    success: Tensor


def drop(world: MarbleWorld, step: Step, cells: Tensor, action: Tensor, number: int) -> Landing:
    """Drops marble `number` of a trial in the columns `action` [...] of boards `cells` [..., P]."""
    marble = world.start(action, number)
    position, success = action, torch.zeros_like(action, dtype=torch.bool)
    for _ in range(world.most_steps):
        cells, marble, now = step(cells, marble)
        position = torch.where(marble < world.none, marble // world.columns, position)
        success = success | now
        if (marble == world.none).all():
            break
    return Landing(cells, position, success)


def play(world: MarbleWorld, step: Step, cells: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """One trial, marble after marble.

    Args:
        cells: [..., P].
        plan: [..., D] columns.

    Returns:
        the last position of each marble, [..., D], and success, [...].
    """
    positions, success = [], torch.zeros_like(plan[..., 0], dtype=torch.bool)
    for number in range(DROPS):
        landing = drop(world, step, cells, plan[..., number], number)
        cells, success = landing.cells, success | landing.success
        positions.append(landing.position)
    return torch.stack(positions, -1), success


class Outcomes(NamedTuple):
    """All trials of boards [...]: A first marbles, and A second ones after each."""

    first: Tensor
    """Last positions of the first marble, [..., A]."""
    second: Tensor
    """Last positions of the second one, [..., A, A]."""
    success: Tensor
    """[..., A, A], bool."""

    @property
    def solvable(self) -> Tensor:
        return self.success.flatten(-2).any(-1)

    def of(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """The results of `play`: plans [..., N, D] of the same boards; positions [..., N, D] and success [..., N]."""
        a, b = plan.unbind(-1)
        both = a * self.first.shape[-1] + b
        first, second = self.first.gather(-1, a), self.second.flatten(-2).gather(-1, both)
        return torch.stack([first, second], -1), self.success.flatten(-2).gather(-1, both)

    def select(self, index: Tensor) -> Outcomes:
        """Of the boards at `index`, counted over the last leading dimension: [S, n] of outcomes [S, B, ...]."""
        rows = torch.arange(index.shape[0], device=index.device)[:, None]
        return Outcomes(*(entry[rows, index] for entry in self))


@dataclass(frozen=True)
class Played:
    """The outcome of a plan, found by playing it: what `Outcomes` looks up. For boards [S, B, P]."""

    world: MarbleWorld
    step: Step
    cells: Tensor

    def of(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """As `Outcomes.of`."""
        return play(self.world, self.step, self.cells[..., None, :].expand(*plan.shape[:-1], -1), plan)


Known = Outcomes | Played


def outcomes(world: MarbleWorld, step: Step, cells: Tensor) -> Outcomes:
    """The outcomes of every plan on boards [..., P]: an exact short cut where many trials of a board are asked for."""
    A = world.actions
    actions = torch.arange(A, device=cells.device).expand(*cells.shape[:-1], A)
    one = drop(world, step, cells[..., None, :].expand(*actions.shape, -1), actions, 0)
    again = actions[..., None, :].expand(*actions.shape, A)
    two = drop(world, step, one.cells[..., None, :].expand(*again.shape, -1), again, 1)
    return Outcomes(one.position, two.position, one.success[..., None] | two.success)
