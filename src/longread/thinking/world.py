"""The marble run: what a marble meets decides its tint, and its tint where it lands.

A board has `rows` × `columns` cells. From the top: curtain rows, empty rows, a row of wedges, the floor with a key and
a sealed goal. A trial is two marbles, one after the other on the same board; marble d starts with tint d in a column
of the top row, which is the action. The first must land on the key, and the second on the goal.

| cell | the marble | the board |
|---|---|---|
| empty | falls one row | |
| curtain of family f | tint <- permutation f of tint, falls one row | |
| wedge | falls one row and moves (tint − columns // 2) columns, round the edge | |
| wall | is gone | |
| key | is gone | the key becomes floor, the sealed goal an open goal |
| sealed goal | is gone | |
| open goal | success, is gone | |
| floor | is gone | |

Another environment is another file with a class of these sizes and six functions: `start`, `step`, `draw`, `mutate`,
`arrangement` and `targets`. All of them are pure functions of tensors with any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longread.config import UserError
from longread.thinking.config import WorldConfig
from longread.thinking.draws import Draws

EMPTY, FLOOR, WEDGE, WALL, KEY, SEALED, OPEN, CURTAIN = range(8)
"""Kinds of cells; the curtain of family f is CURTAIN + f."""
TUNED = ((4, 0, 1, 3, 2), (3, 4, 0, 1, 2), (2, 4, 1, 3, 0), (1, 4, 3, 2, 0))
"""Permutation seed 0: drawn once by the rule of `permutations`, before any agent was trained."""
DROPS = 2
"""Marbles of a trial."""


def permutations(config: WorldConfig) -> tuple[tuple[int, ...], ...]:
    """The tint that each family's curtain makes of each tint: at random, no two of them commute, and each moves
    all tints but one at most. Raises `UserError` where no such families are found."""
    if config.permutation_seed == 0:
        return TUNED[: config.families]
    draws = Draws.from_seeds([config.permutation_seed]).of("families")
    found: list[tuple[int, ...]] = []
    for attempt in range(10_000):
        new = tuple(draws.of(attempt).subset(config.columns, config.columns)[0].tolist())
        moved = sum(before != after for before, after in enumerate(new))
        if moved >= config.columns - 1 and not any(_commute(new, other) for other in found):
            found.append(new)
        if len(found) == config.families:
            return tuple(found)
    raise UserError(f"world.families is {config.families}; too many for {config.columns} tints, choose fewer")


def _commute(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(a[b[t]] == b[a[t]] for t in range(len(a)))


class MarbleWorld:
    """The rules for boards of one size.

    Letters: P = rows × columns cells, A = columns actions, also the number of tints, R curtain rows. `cells` are int64
    [..., P] of kinds, `marble` is int64 [...]: position × A + tint, or `none`.
    """

    def __init__(self, config: WorldConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.rows, self.columns, self.curtain_rows = config.rows, config.columns, config.curtain_rows
        self.families = config.families
        self.cells, self.actions, self.kinds = self.rows * self.columns, self.columns, CURTAIN + config.families
        self.none = self.cells * self.columns
        self.most_steps = self.rows + 2
        """Of one marble; in the world it needs `rows` at most, in a poor model it may stay longer."""
        plain = [tuple(range(self.columns))] * CURTAIN
        self._tint_after = torch.tensor([*plain, *permutations(config)], device=device)

    def start(self, action: Tensor, drop: int) -> Tensor:
        """Marble number `drop` in the column `action` of the top row."""
        return action * self.columns + drop

    def step(self, cells: Tensor, marble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The effect of the cell that a marble is in: cells, marble and success (bool) afterwards."""
        there = marble < self.none
        position = torch.where(there, marble // self.columns, 0)
        tint = marble % self.columns
        kind = torch.where(there, cells.gather(-1, position[..., None])[..., 0], FLOOR)
        after = self._tint_after[kind, tint]
        shift = torch.where(kind == WEDGE, tint - self.columns // 2, 0)
        column = (position + shift - position // self.columns * self.columns) % self.columns
        row = position // self.columns + 1
        falls = ((kind == EMPTY) | (kind == WEDGE) | (kind >= CURTAIN)) & (row < self.rows)
        moved = torch.where(falls, (row * self.columns + column) * self.columns + after, self.none)
        unlocked = torch.where(cells == KEY, FLOOR, torch.where(cells == SEALED, OPEN, cells))
        return torch.where((kind == KEY)[..., None], unlocked, cells), moved, kind == OPEN

    def draw(self, draws: Draws, count: int) -> Tensor:
        """Boards as they come, some of them unsolvable: [S, count, P].

        Each curtain row is of one family or empty; with chance 1/2 one curtain cell is a wall; key and goal lie in two
        columns of the floor.
        """
        board = torch.full((draws.count, count, self.rows, self.columns), EMPTY, device=self.device)
        board[..., : self.curtain_rows, :] = self._rows(draws.of("rows").uniform(count, self.curtain_rows))[..., None]
        board[..., -2, :] = WEDGE
        board[..., -1, :] = FLOOR
        ends = draws.of("floor").uniform(count, self.columns).argsort(-1)
        board[..., -1, :].scatter_(-1, ends[..., :1], KEY)
        board[..., -1, :].scatter_(-1, ends[..., 1:2], SEALED)
        board = board.flatten(-2)
        wall = draws.of("wall").integers(2 * self.curtain_rows * self.columns, count)
        walled = torch.arange(self.curtain_rows * self.columns, device=self.device) == wall[..., None]
        board[..., : self.curtain_rows * self.columns].masked_fill_(walled, WALL)
        return board

    def _rows(self, uniform: Tensor) -> Tensor:
        """The kind of a curtain row, from a number in [0, 1)."""
        empty = self.config.empty_chance
        empty = 1 / (self.families + 1) if empty is None else empty
        family = ((uniform - empty) / (1 - empty) * self.families).long().clamp(0, self.families - 1)
        return torch.where(uniform < empty, EMPTY, CURTAIN + family)

    def mutate(self, draws: Draws, cells: Tensor) -> Tensor:
        """Neighbours of boards [S, n, P], one to three changes away: two curtain rows swapped, one written anew, the
        floor turned, or two of its cells swapped."""
        count = cells.shape[1]
        changes = 1 + draws.of("changes").integers(3, count)
        for change in range(3):
            new = self._changed(draws.of("change", change), cells)
            cells = torch.where((change < changes)[..., None], new, cells)
        return cells

    def _changed(self, draws: Draws, cells: Tensor) -> Tensor:
        count = cells.shape[1]
        board = cells.unflatten(-1, (self.rows, self.columns))
        curtains, floor = board[..., : self.curtain_rows, :], board[..., -1, :]
        rows = _swapped(draws.of("rows"), count, self.curtain_rows)
        swapped = curtains.gather(-2, rows[..., None].expand_as(curtains))
        kind = self._rows(draws.of("kind").uniform(count))[..., None, None]
        chosen = draws.of("row").integers(self.curtain_rows, count)[..., None, None]
        here = torch.arange(self.curtain_rows, device=cells.device)[:, None] == chosen
        rewritten = torch.where(here & (curtains != WALL), kind, curtains)
        places = torch.arange(self.columns, device=cells.device)
        by = 1 + draws.of("turn").integers(self.columns - 1, count)
        turned = floor.gather(-1, (places + by[..., None]) % self.columns)
        exchanged = floor.gather(-1, _swapped(draws.of("floor"), count, self.columns))
        which = draws.of("which").integers(4, count)[..., None]
        new_floor = torch.where(which == 2, turned, torch.where(which == 3, exchanged, floor))
        which = which[..., None]
        new_curtains = torch.where(which == 0, swapped, torch.where(which == 1, rewritten, curtains))
        parts = (new_curtains, board[..., self.curtain_rows : -1, :], new_floor[..., None, :])
        return torch.cat(parts, -2).flatten(-2)

    def arrangement(self, cells: Tensor) -> Tensor:
        """The family of each curtain row, or `families` for none: [..., R]."""
        rows = cells.unflatten(-1, (self.rows, self.columns))[..., : self.curtain_rows, :]
        highest = rows.amax(-1)  # curtains are the highest kinds, so a wall hides none
        return torch.where(highest >= CURTAIN, highest - CURTAIN, self.families)

    def targets(self, cells: Tensor) -> Tensor:
        """The columns in which the marbles of a trial must land: those of the key and the goal, [..., D]."""
        floor = cells.unflatten(-1, (self.rows, self.columns))[..., -1, :]
        return torch.stack([(floor == KEY).long().argmax(-1), (floor == SEALED).long().argmax(-1)], -1)


def _swapped(draws: Draws, count: int, size: int) -> Tensor:
    """The identity of `size` places with two of them swapped: [S, count, size]."""
    i, j = draws.uniform(count, size).argsort(-1)[..., :2].unbind(-1) if size > 1 else (draws.integers(1, count),) * 2
    places = torch.arange(size, device=i.device).expand(*i.shape, size)
    i, j = i[..., None], j[..., None]
    return torch.where(places == i, j, torch.where(places == j, i, places))
