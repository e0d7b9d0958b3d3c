"""How a training run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longread.model import Transformer


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`."""

    model: Transformer
    step: int
    """Finished steps, over all starts of the run."""
    saved_step: int
    """Of the newest checkpoint, from which the run can go on; fewer than `step` where the last steps were bad."""
    tokens: int
    """Targets trained on, over all starts."""
    seconds: float
    """Since this start."""
    row: dict[str, Any] | None
    """The last row of metrics; None if there was nothing left to do."""
    model_directory: Path | None
    """None if the run was interrupted: it can be resumed."""
    signal: int | None = None
    """That interrupted it."""

    @property
    def interrupted(self) -> bool:
        return self.model_directory is None
