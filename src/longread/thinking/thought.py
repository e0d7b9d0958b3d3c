"""One agent thinks about one board, and then acts: every trial as it was imagined, then the only real one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import UserError
from longread.thinking.agent import ACTING, MENTAL
from longread.thinking.draws import Draws
from longread.thinking.thinker import Thinker
from longread.thinking.trials import Played, Step
from longread.thinking.world import DROPS, MarbleWorld


class Marble(NamedTuple):
    """A marble in a cell."""

    position: int
    tint: int


class ShownTrial(NamedTuple):
    """A trial as it was seen."""

    plan: tuple[int, ...]
    paths: tuple[tuple[Marble, ...], ...]
    """Of each marble, the places it was in; the last is where it ended."""
    success: bool
    policy: tuple[tuple[float, ...], ...]
    """Of which the plan was drawn: for each marble, of each action."""


class Thought(NamedTuple):
    """One trial on a board."""

    cells: tuple[int, ...]
    trials: tuple[ShownTrial, ...]
    """In the world model."""
    act: ShownTrial
    """In the world."""


@torch.no_grad()
def think(thinker: Thinker, cells: Tensor, *, trials: int | None = None, seed: int = 0) -> Thought:
    """Thinks about a board [P] in the world model, then acts once in the world.

    Args:
        trials: K; None: as in training. With 0 it acts at once.
        seed: of what it tries.

    Raises:
        UserError: the board does not have the world's size or holds what it does not know, or `trials` is negative.
    """
    world, trials = thinker.world, thinker.config.trials if trials is None else trials
    if trials < 0:
        raise UserError(f"trials is {trials}; it must be at least 0")
    if cells.shape != (world.cells,) or not ((cells >= 0) & (cells < world.kinds)).all():
        raise UserError(
            f"a board is {world.cells} cells of kinds 0 to {world.kinds - 1}; draw one with MarbleWorld.draw"
        )
    board = cells.to(world.device).long().expand(1, 1, -1)
    draws = Draws.from_seeds([seed], world.device).of("think")
    task = thinker.agent.view(board)
    fast = thinker.agent.begin(task, 1)
    imagined, seen = Played(world, thinker.model.step, board), []
    for number in range(trials):
        uniform = draws.of("mental", number).uniform(1, 1, DROPS)
        trial, fast = thinker.agent.trial(task, fast, MENTAL, imagined, uniform)
        fast = thinker.agent.learn(task, fast, trial)
        seen.append(_shown(world, thinker.model.step, board, trial.plan, trial.policy))
    real = Played(world, world.step, board)
    acted, _ = thinker.agent.trial(task, fast, ACTING, real, draws.of("act").uniform(1, 1, DROPS))
    act = _shown(world, world.step, board, acted.plan, acted.policy)
    return Thought(tuple(cells.tolist()), tuple(seen), act)


def _shown(world: MarbleWorld, step: Step, board: Tensor, plan: Tensor, policy: Tensor) -> ShownTrial:
    """Plays a trial once, and keeps every place."""
    cells, won, paths = board, False, []
    for number in range(DROPS):
        marble, path = world.start(plan[:, :, 0, number], number), []
        for _ in range(world.most_steps):
            if int(marble) == world.none:
                break
            path.append(Marble(int(marble) // world.columns, int(marble) % world.columns))
            cells, marble, success = step(cells, marble)
            won = won or bool(success)
        paths.append(tuple(path))
    chances = tuple(tuple(row) for row in policy[0, 0, 0].tolist())
    return ShownTrial(tuple(plan[0, 0, 0].tolist()), tuple(paths), won, chances)
