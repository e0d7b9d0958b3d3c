"""Which boards are trained on, and which are withheld: those that hold a combination of families.

The families of a board are on it from the first moment to the last, so that a combination is withheld is proved by
looking at the boards on which trials begin.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import UserError
from longread.thinking.draws import Draws
from longread.thinking.trials import Outcomes, outcomes
from longread.thinking.world import DROPS, MarbleWorld

_AT_ONCE = 8192
"""Boards that are drawn together where only some are wanted."""


class WithheldRule(NamedTuple):
    """The families withheld from each of S agents: [S, families] bool, and whether three families are too many."""

    withheld: Tensor
    pairs: bool = False


def rule(world: MarbleWorld, withheld: Sequence[str], *, pairs: bool = False) -> WithheldRule:
    """The rule of agents from which the families named by letters are withheld together."""
    letters = string.ascii_lowercase[: world.families]
    mask = [[letter in names for letter in letters] for names in withheld]
    return WithheldRule(torch.tensor(mask, device=world.device), pairs)


def families_on(world: MarbleWorld, cells: Tensor) -> Tensor:
    """Which families a board holds: [..., P] -> bool [..., families]."""
    every = torch.arange(world.families, device=cells.device)
    return (world.arrangement(cells)[..., None] == every).any(-2)


def is_legal(world: MarbleWorld, cells: Tensor, rule: WithheldRule) -> Tensor:
    """Whether boards [S, n, P] may occur in training: [S, n]."""
    held = families_on(world, cells)
    legal = ~(held | ~rule.withheld[:, None]).all(-1)
    return legal & (held.sum(-1) < 3) if rule.pairs else legal


def draw_legal(world: MarbleWorld, draws: Draws, rule: WithheldRule, count: int) -> Tensor:
    """Boards as they come, without those that are withheld: [S, count, P]."""
    cells = world.draw(draws.of("boards", 0), count)
    attempt = 0
    while not (legal := is_legal(world, cells, rule)).all():
        attempt += 1
        cells = torch.where(legal[..., None], cells, world.draw(draws.of("boards", attempt), count))
    return cells


def mutate_legal(world: MarbleWorld, draws: Draws, rule: WithheldRule, cells: Tensor) -> Tensor:
    """Neighbours of boards [S, n, P]; one that is withheld stays what it was."""
    children = world.mutate(draws, cells)
    return torch.where(is_legal(world, children, rule)[..., None], children, cells)


class CertifiedSet(NamedTuple):
    """Boards that hold a combination and nothing else, each of them solvable."""

    families: str
    cells: Tensor
    """[n, P]"""
    outcomes: Outcomes
    """In the world, by brute force over all plans: the certificate that each can be solved."""
    sha256: str

    @property
    def chance(self) -> float:
        """Success of a plan drawn at random."""
        return float(self.outcomes.success.double().mean())


def certified_set(world: MarbleWorld, families: str, count: int, seed: int = 0) -> CertifiedSet:
    """`count` boards drawn as in training, but for these: exactly the named families are on them, and a plan wins.

    Raises:
        UserError: there are no such families, or too many for a board.
    """
    letters = string.ascii_lowercase[: world.families]
    if not set(families) <= set(letters) or not 0 < len(set(families)) == len(families) <= world.curtain_rows:
        raise UserError(
            f"families is {families!r}; it must be at most {world.curtain_rows} different letters of {letters}"
        )
    wanted = rule(world, [families]).withheld[0]
    found: list[Tensor] = []
    draws = Draws.from_seeds([seed], world.device).of("certified set", families)
    attempt = 0
    while sum(map(len, found)) < count:
        cells = world.draw(draws.of(attempt), _AT_ONCE)[0]
        cells = cells[(families_on(world, cells) == wanted).all(-1)]
        found.append(cells[outcomes(world, world.step, cells).solvable])
        attempt += 1
    cells = torch.cat(found)[:count]
    data = cells.to("cpu", torch.uint8).numpy().tobytes()
    return CertifiedSet(families, cells, outcomes(world, world.step, cells), hashlib.sha256(data).hexdigest())


class Transitions(NamedTuple):
    """Sub-steps of marbles: what a world model learns from. n transitions of each of S agents."""

    cells: Tensor
    marble: Tensor
    next_cells: Tensor
    next_marble: Tensor
    success: Tensor
    valid: Tensor
    """[S, n]: False where the marble was gone already."""


def random_play(world: MarbleWorld, draws: Draws, cells: Tensor) -> Transitions:
    """Every sub-step of one random trial on each of the boards [S, n, P]."""
    plan = draws.of("plan").integers(world.actions, cells.shape[1], DROPS)
    steps = []
    for number in range(DROPS):
        marble = world.start(plan[..., number], number)
        for _ in range(world.rows):
            after, next_marble, success = world.step(cells, marble)
            steps.append(Transitions(cells, marble, after, next_marble, success, marble < world.none))
            cells, marble = after, next_marble
    return Transitions(*(torch.cat(parts, 1) for parts in zip(*steps, strict=True)))


def coverage(world: MarbleWorld, transitions: Transitions) -> Tensor:
    """How often each tint met a curtain of each family: [S, families, tints]."""
    position = torch.where(transitions.valid, transitions.marble // world.columns, 0)
    kind = transitions.cells.gather(-1, position[..., None])[..., 0]
    first = world.kinds - world.families
    meets = transitions.valid & (kind >= first)
    index = torch.where(meets, (kind - first) * world.columns + transitions.marble % world.columns, 0)
    counts = torch.zeros(len(kind), world.families * world.columns, dtype=torch.int64, device=kind.device)
    return counts.scatter_add_(1, index, meets.long()).unflatten(-1, (world.families, world.columns))
