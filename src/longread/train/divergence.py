"""Whether a run diverges: each step is judged by those before it.

A step is bad when its loss or the norm of its outer gradient lies far above what it has been: above `NORM_FACTOR` times
the median of the norms, or above `LOSS_FACTOR` times the median of the losses and by `LOSS_DEVIATIONS` of their median
deviations. Medians run over the last `HISTORY` good steps, so neither a spike nor the divergence itself moves them, and
there must be `FEWEST` of them. From the first step on, a loss is also bad above `LOSS_FACTOR` times what it costs to
know nothing, ln V, or what the first step cost if that was more, or if the run began with a model, which knows
something. A single bad step is a spike, and harmless as a rule;
many in a row are a run that no longer learns.

The history is a function of the rows of metrics.jsonl, so a resumed run judges as one that was never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

HISTORY, FEWEST = 50, 20
"""Good steps that a step is compared with: at most, and at least."""
NORM_FACTOR = 30.0
LOSS_FACTOR = 1.5
LOSS_DEVIATIONS = 6.0
SAID_AFTER = 3
"""Bad steps in a row after which a warning says so."""


class DivergenceWatch:
    """Counts the bad steps in a row at the end of a run."""

    def __init__(self, vocab_size: int, rows: Iterable[Mapping[str, Any]] = (), *, knows: bool = False) -> None:
        """`rows` of metrics.jsonl are the steps so far; `knows`: the run began with the weights of a model."""
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._nothing = 0.0 if knows else math.log(vocab_size)
        """Loss of a model that knows nothing, or the first loss if that was more, or if `knows`."""
        self._begun = False
        self.bad_steps = 0
        """In a row, the last step included; 0: that step was good."""
        for row in rows:
            if isinstance(row.get("loss"), float) and isinstance(row.get("grad_norm"), float):
                self.see(row["loss"], row["grad_norm"])
            elif "skipped" in row:
                self.see_skipped()

    def see(self, loss: float, norm: float) -> None:
        """Judges the next step by its loss and the norm of its outer gradient before clipping."""
        if not self._begun:
            self._begun, self._nothing = True, max(self._nothing, loss)
        if loss > LOSS_FACTOR * self._nothing or (len(self._losses) >= FEWEST and self._is_far_above(loss, norm)):
            self.bad_steps += 1
            return
        self.bad_steps = 0
        self._losses.append(loss)
        self._norms.append(norm)

    def see_skipped(self) -> None:
        """A step that was left out, for its numbers were not finite, is bad."""
        self.bad_steps += 1

    def _is_far_above(self, loss: float, norm: float) -> bool:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(other - median) for other in self._losses)
        highest = max(LOSS_FACTOR * median, median + LOSS_DEVIATIONS * deviation)
        return loss > highest or norm > NORM_FACTOR * statistics.median(self._norms)

    def describe(self, loss: float, norm: float) -> str:
        """A step beside what had been usual."""
        if not self._losses:
            return f"loss {loss:.4g}, outer gradient norm {norm:.4g}"
        usual = statistics.median(self._losses), statistics.median(self._norms)
        return f"loss {loss:.4g} (median before: {usual[0]:.4g}), outer gradient norm {norm:.4g} ({usual[1]:.4g})"
