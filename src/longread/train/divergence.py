"""Whether a run diverges: each step is judged by those before it.

A step is bad when its loss or the norm of its outer gradient lies far above what it has been: above `NORM_FACTOR` times
the median of the norms, or above the median of the losses by half of it and by `LOSS_DEVIATIONS` of their median
deviations. Medians run over the last `HISTORY` good steps, so neither a spike nor the divergence itself moves them;
nothing is judged before there are `FEWEST` of them. A single bad step is a spike, and harmless as a rule; many in a row
are a run that no longer learns.

The history is a function of the rows of metrics.jsonl, so a resumed run judges as one that was never stopped.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

HISTORY, FEWEST = 100, 20
"""Good steps that a step is compared with: at most, and at least."""
NORM_FACTOR = 30.0
LOSS_FACTOR = 1.5
LOSS_DEVIATIONS = 10.0
SAID_AFTER = 3
"""Bad steps in a row after which a warning says so."""


class Divergence:
    """Counts the bad steps in a row at the end of a run."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """`rows` of metrics.jsonl are the steps so far."""
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self.bad_steps = 0
        """In a row, the last step included; 0: that step was good."""
        for row in rows:
            self.see(row["loss"], row["grad_norm"])

    def see(self, loss: float, norm: float) -> None:
        """Judges the next step by its loss and the norm of its outer gradient before clipping."""
        if len(self._losses) >= FEWEST and (loss > self._highest_loss() or norm > self._highest_norm()):
            self.bad_steps += 1
            return
        self.bad_steps = 0
        self._losses.append(loss)
        self._norms.append(norm)

    def _highest_loss(self) -> float:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return max(LOSS_FACTOR * median, median + LOSS_DEVIATIONS * deviation)

    def _highest_norm(self) -> float:
        return NORM_FACTOR * statistics.median(self._norms)

    def describe(self, loss: float, norm: float) -> str:
        """The last step beside what had been usual."""
        usual = statistics.median(self._losses), statistics.median(self._norms)
        return f"loss {loss:.4g} (median before: {usual[0]:.4g}), outer gradient norm {norm:.4g} ({usual[1]:.4g})"
