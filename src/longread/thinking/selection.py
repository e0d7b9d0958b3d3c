"""Which legal boards an iteration trains on: those that are worth it, by what thinking adds to them.

A rule gives a board a score, from its success before and after thinking (means over copies). `gap` is that of the
abstract of arXiv 2503.19815; the others are for comparison, and `random` has no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from longread.thinking.config import ThinkingConfig
from longread.thinking.draws import Draws
from longread.thinking.tasks import WithheldRule, draw_legal, mutate_legal
from longread.thinking.world import MarbleWorld

Score = Callable[[Tensor, Tensor], Tensor]
SEQUENCE_SHARE, SEQUENCE_TEMPERATURE = 0.75, 0.15
_POOL = 16
"""Fresh boards, in multiples of those wanted, among which `sequence_gap` chooses."""


def gap(before: Tensor, after: Tensor) -> Tensor:
    """The gain of thinking."""
    return after - before


def learnability(before: Tensor, after: Tensor) -> Tensor:
    """The variance of success after thinking: boards that are solved now and then."""
    return after * (1 - after)


def gap_unsolved(before: Tensor, after: Tensor) -> Tensor:
    """The gain of thinking, on boards that it does not solve for sure yet."""
    return (after - before) * (1 - after)


SCORES: dict[str, Score] = {"gap": gap, "learnability": learnability, "gap_unsolved": gap_unsolved}


class Selector(Protocol):
    """Chooses the boards of an iteration, and is told how they went."""

    def boards(self, draws: Draws) -> Tensor:
        """The boards of an iteration, [S, B, P]."""

    def update(self, draws: Draws, before: Tensor, after: Tensor) -> None:
        """Success [S, B] on the boards that were given last."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it remembers."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""


def make_selector(world: MarbleWorld, rule: WithheldRule, draws: Draws, config: ThinkingConfig) -> Selector:
    """The selector that a config names."""
    if config.selection == "random":
        return Fresh(world, rule, config.boards)
    if config.selection == "sequence_gap":
        return Sequences(world, rule, config.boards, draws.count)
    return Population(world, rule, draws, config)


class Fresh:
    """Boards as they come."""

    def __init__(self, world: MarbleWorld, rule: WithheldRule, count: int) -> None:
        self.world, self.rule, self.count = world, rule, count

    def boards(self, draws: Draws) -> Tensor:
        """The boards of an iteration, [S, B, P]."""
        return draw_legal(self.world, draws.of("fresh"), self.rule, self.count)

    def update(self, draws: Draws, before: Tensor, after: Tensor) -> None:
        """Nothing is remembered."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


class Population:
    """Boards that evolve: the worst of those that were tried make room for mutants of the best, and for fresh ones."""

    def __init__(self, world: MarbleWorld, rule: WithheldRule, draws: Draws, config: ThinkingConfig) -> None:
        self.world, self.rule, self.config = world, rule, config
        self.score_of = SCORES[config.selection]
        self.cells = draw_legal(world, draws.of("population"), rule, config.population)
        self.score = torch.zeros(self.cells.shape[:2], dtype=torch.float64, device=self.cells.device)
        self.tried = torch.zeros_like(self.score, dtype=torch.bool)
        self._chosen = torch.empty(0, dtype=torch.int64)

    def boards(self, draws: Draws) -> Tensor:
        """The boards of an iteration, [S, B, P]: some of the population at random."""
        self._chosen = draws.of("visited").subset(self.config.boards, self.config.population)
        return self.cells.gather(1, self._everywhere(self._chosen))

    def update(self, draws: Draws, before: Tensor, after: Tensor) -> None:
        """Halves the distance of scores to new ones, then lets the worst go."""
        score, chosen = self.score_of(before.double(), after.double()), self._chosen
        known = self.score.gather(1, chosen)
        self.score = self.score.scatter(
            1, chosen, torch.where(self.tried.gather(1, chosen), (known + score) / 2, score)
        )
        self.tried = self.tried.scatter(1, chosen, True)
        leaving = self.config.replaced
        worst = torch.where(self.tried, self.score, torch.inf).argsort(dim=1, stable=True)[:, :leaving]
        best = torch.where(self.tried, -self.score, torch.inf).argsort(dim=1, stable=True)[:, :leaving]
        new = mutate_legal(self.world, draws.of("mutants"), self.rule, self.cells.gather(1, self._everywhere(best)))
        if self.config.fresh:
            fresh = draw_legal(self.world, draws.of("fresh"), self.rule, self.config.fresh)
            new = torch.cat([new[:, : leaving - self.config.fresh], fresh], 1)
        self.cells = self.cells.scatter(1, self._everywhere(worst), new)
        self.tried = self.tried.scatter(1, worst, False)

    def _everywhere(self, index: Tensor) -> Tensor:
        """[S, n] -> [S, n, P], to gather or scatter whole boards."""
        return index[..., None].expand(*index.shape, self.cells.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Boards, their scores, and which were tried."""
        return {"cells": self.cells, "score": self.score, "tried": self.tried}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        device = self.cells.device
        self.cells, self.score, self.tried = (tensors[name].to(device) for name in ("cells", "score", "tried"))


class Sequences:
    """Fresh boards always, three quarters of them by what thinking adds to their sequence of curtains."""

    def __init__(self, world: MarbleWorld, rule: WithheldRule, count: int, seeds: int) -> None:
        self.world, self.rule, self.count = world, rule, count
        base = world.families + 1
        self._places = base ** torch.arange(world.curtain_rows, device=world.device)
        self.gap = torch.zeros(seeds, base**world.curtain_rows, dtype=torch.float64, device=world.device)
        self._sequence = torch.empty(0, dtype=torch.int64)

    def boards(self, draws: Draws) -> Tensor:
        """The boards of an iteration, [S, B, P]."""
        pool = draw_legal(self.world, draws.of("pool"), self.rule, _POOL * self.count)
        sequence = (self.world.arrangement(pool) * self._places).sum(-1)
        common = torch.zeros_like(self.gap).scatter_add_(1, sequence, torch.ones_like(sequence, dtype=torch.float64))
        weight = (self.gap / SEQUENCE_TEMPERATURE - common.clamp(min=1).log()).gather(1, sequence)
        noise = -(-draws.of("noise").uniform(pool.shape[1]).clamp(min=1e-300).log()).log()
        by_gap = round(SEQUENCE_SHARE * self.count)
        chosen = (weight + noise).argsort(1, descending=True)[:, :by_gap]  # without replacement, by Gumbel noise
        rest = draws.of("rest").subset(self.count - by_gap, pool.shape[1])
        index = torch.cat([chosen, rest], 1)
        self._sequence = sequence.gather(1, index)
        return pool.gather(1, index[..., None].expand(*index.shape, pool.shape[-1]))

    def update(self, draws: Draws, before: Tensor, after: Tensor) -> None:
        """Halves the distance of each sequence that was met to its mean gap."""
        new = gap(before.double(), after.double())
        total = torch.zeros_like(self.gap).scatter_add_(1, self._sequence, new)
        times = torch.zeros_like(self.gap).scatter_add_(1, self._sequence, torch.ones_like(new))
        self.gap = torch.where(times > 0, (self.gap + total / times.clamp(min=1)) / 2, self.gap)

    def tensors(self) -> dict[str, Tensor]:
        """The gap of every sequence."""
        return {"gap": self.gap}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        self.gap = tensors["gap"].to(self.gap.device)
