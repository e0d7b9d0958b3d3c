"""The place of a process among those that `torchrun` has started, as its environment says it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from longread.config import UserError


@dataclass(frozen=True)
class Launch:
    """A process's place among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    restarts: int = 0
    """How often all were started again after one had failed."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As `torchrun` says it; alone where it does not. Raises `UserError` for what is no place."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}
        if environment.get("WORLD_SIZE", "1") == "1" and "TORCHELASTIC_RESTART_COUNT" not in environment:
            return cls()
        try:
            launch = cls(*(int(environment.get(name, default)) for name, default in names.items()))
        except ValueError as error:
            raise UserError(f"the environment of torchrun is damaged: {error}; start with torchrun") from None
        if not (0 <= launch.rank < launch.size and 0 <= launch.local_rank < launch.local_size <= launch.size):
            raise UserError(f"rank {launch.rank} of {launch.size} is no place among processes; start with torchrun")
        return launch


ONE = Launch()
"""A process that was started alone."""
