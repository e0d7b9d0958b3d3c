"""The config of a thinking agent: all that decides the result, and nothing about where it happens."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Literal

from longread.config import UserError
from longread.config.checked import Checked

Kind = Literal["plastic", "recurrent"]
Memory = Literal["linear", "fast_mlp"]
Teaching = Literal["off", "scalar", "vector"]
Selection = Literal["random", "gap", "learnability", "gap_unsolved", "sequence_gap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig(Checked):
    """The marble run (`longread.thinking.world`)."""

    _path = "world."

    rows: int = 6
    columns: int = 5
    """Also the number of tints."""
    curtain_rows: int = 3
    families: int = 4
    permutation_seed: int = 0
    """Of what the curtains do; 0 is the table that every choice was made on."""
    empty_chance: float | None = None
    """That a curtain row has no curtain; None: as likely as each family."""

    def _check(self) -> None:
        self._at_least(1, "curtain_rows")
        self._at_least(2, "families")
        self._at_least(0, "permutation_seed")
        if not 5 <= self.columns <= 9:
            raise UserError(f"world.columns is {self.columns}; it must be 5 to 9")
        if self.families > 8:
            raise UserError(f"world.families is {self.families}; it must be at most 8")
        if self.rows < self.curtain_rows + 2:
            raise UserError(
                f"world.rows is {self.rows}; {self.curtain_rows} curtain rows, the wedges and the floor need "
                f"{self.curtain_rows + 2}"
            )
        if self.empty_chance is not None and not 0 <= self.empty_chance < 1:
            raise UserError(f"world.empty_chance is {self.empty_chance}; it must lie in [0, 1)")
        if self.permutation_seed == 0 and (self.families > 4 or self.columns != 5):
            raise UserError(
                "world.permutation_seed 0 is a table of 4 families of 5 tints; choose another seed for other sizes"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTraining(Checked):
    """How the world model is trained, before the agent and apart from it."""

    _path = "world_model."

    steps: int = 1000
    batch_size: int = 128
    """Transitions of a step."""
    lr: float = 4e-3
    width: int = 64
    boards: int = 2500
    """Whose transitions are drawn from, until `renew_every` steps later others are played."""
    renew_every: int = 250

    def _check(self) -> None:
        self._at_least(0, "steps")
        self._at_least(1, "batch_size", "width", "boards", "renew_every")
        if self.lr <= 0:
            raise UserError(f"world_model.lr is {self.lr}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingConfig(Checked):
    """One agent and its world model."""

    withheld: str = "abc"
    """Letters of the families that never occur together in training."""
    pairs: bool = False
    """Stricter: at most two families on any board of training."""
    world: WorldConfig = field(default_factory=WorldConfig)
    world_model: ModelTraining = field(default_factory=ModelTraining)
    agent: Kind = "plastic"
    memory: Memory = "linear"
    teach: Teaching = "vector"
    width: int = 256
    key_width: int = 32
    teacher_width: int = 128
    iterations: int = 1500
    boards: int = 64
    """Of an iteration."""
    copies: int = 4
    """That try each board, each for itself."""
    trials: int = 8
    """K, mental trials before acting."""
    lr: float = 2e-3
    warmup: int = 50
    entropy: float = 0.03
    """Its weight in the first iteration; it falls to a tenth."""
    trial_weight: float = 0.3
    """Of a mental trial's own success, beside that of the act which it leads to."""
    consolidation: float = 4.0
    """Weight of the loss by which the slow weights learn what thinking has found."""
    swapped_share: float = 0.0
    """Share of boards that are thought about with the slow logits of another board: confident and wrong."""
    selection: Selection = "random"
    population: int = 768
    replaced: int = 16
    """Boards that leave the population in an iteration."""
    fresh: int = 4
    """Of these, replaced by boards that are drawn; the others by mutants."""
    seed: int = 0
    checkpoint_every: int | None = None

    def _check(self) -> None:
        self._at_least(1, "width", "key_width", "teacher_width", "iterations", "boards", "checkpoint_every")
        self._at_least(0, "trials", "warmup", "entropy", "trial_weight", "consolidation", "fresh", "seed")
        self._at_least(2, "copies")
        known = string.ascii_lowercase[: self.world.families]
        if len(set(self.withheld)) != len(self.withheld) or not set(self.withheld) <= set(known) or not self.withheld:
            raise UserError(f"withheld is {self.withheld!r}; it must be different letters of {known}")
        if len(self.withheld) > self.world.curtain_rows:
            raise UserError(
                f"withheld is {self.withheld!r}; {self.world.curtain_rows} curtain rows hold at most as many families"
            )
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}; it must be positive")
        if not 0 <= self.swapped_share <= 1:
            raise UserError(f"swapped_share is {self.swapped_share}; it must lie in [0, 1]")
        if self.agent == "recurrent" and (self.memory != "linear" or self.swapped_share):
            raise UserError("agent recurrent has neither a memory of fast weights nor slow logits; leave them out")
        if not self.fresh <= self.replaced <= self.population // 2:
            raise UserError(
                f"replaced is {self.replaced}; it must be at least fresh, {self.fresh}, and at most half of "
                f"population, {self.population}"
            )
        if self.boards > self.population:
            raise UserError(f"boards is {self.boards}; it must be at most population, {self.population}")
        if self.seed >= 2**62:
            raise UserError(f"seed is {self.seed}; it must be below 2^62")
