"""Health of the inner loop along a text: gradient norms, clipped steps, drift of the fast weights, divergence.

A step whose gradient is not finite makes every later loss of that text not a number. Such a reading is not dropped
and not averaged away: it is reported with the position, and its losses from there on count as infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longread.evaluate.estimate import Estimate, ratio


@dataclass(slots=True)
class InnerSteps:
    """Running health of the inner loop: how large its gradients are and how many of them were clipped."""

    clip: float | None
    count: int = 0
    clipped: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, norms: np.ndarray) -> None:
        """Takes the gradient norms of the next inner steps, any shape; those that are not finite do not count."""
        norms = norms[np.isfinite(norms)]
        if norms.size:
            self.count += norms.size
            self.total += float(norms.sum())
            self.largest = max(self.largest, float(norms.max()))
            self.clipped += 0 if self.clip is None else int((norms > self.clip).sum())

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    @property
    def clipped_share(self) -> float:
        return self.clipped / max(1, self.count)


class StepsByPosition:
    """`InnerSteps` for each octave of positions; a step belongs to the last token that it learns to predict."""

    def __init__(self, clip: float | None, mini_batch_size: int) -> None:
        self._clip, self._M = clip, mini_batch_size
        self._octaves: dict[int, InnerSteps] = {}

    def add(self, norms: np.ndarray, first: int) -> None:
        """Takes the norms [n] of the steps `first`, first + 1, … of one text."""
        octave = np.floor(np.log2((first + 1 + np.arange(len(norms))) * self._M)).astype(int)
        for k in np.unique(octave):
            self._octaves.setdefault(int(k), InnerSteps(self._clip)).add(norms[octave == k])

    def bins(self) -> list[StepsBin]:
        """One entry for each octave that holds a step."""
        return [
            StepsBin(2**k, 2 ** (k + 1), steps.count, steps.mean, steps.largest, steps.clipped_share)
            for k, steps in sorted(self._octaves.items())
            if steps.count
        ]


@dataclass(frozen=True, slots=True)
class StepsBin:
    """Inner steps taken after start … end - 1 tokens."""

    start: int
    end: int
    steps: int
    mean_gradient_norm: float
    largest_gradient_norm: float
    clipped_share: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """A reading that turned not finite: which document, after how many tokens, and the norm of the gradient there."""

    document: str
    position: int
    gradient_norm: float | None
    """Of the newest step; it may itself not be finite. None: no step had been taken."""

    def __str__(self) -> str:
        norm = "" if self.gradient_norm is None else f", gradient norm {self.gradient_norm:.3g}"
        return f"{self.document} after {self.position:,} tokens{norm}"


@dataclass(frozen=True, slots=True)
class Health:
    """The inner loop: gradient norms, share of clipped steps, relative drift of the fast weights."""

    steps: int
    mean_gradient_norm: float
    largest_gradient_norm: float
    clipped_share: float
    drift: list[tuple[int, float]]
    """(tokens read, mean over documents of ‖W - W_0‖ / ‖W_0‖)"""
    by_position: list[StepsBin]
    drift_by_position: list[tuple[int, Estimate]]
    """The same drift wherever it was measured, with intervals over documents."""


def health(steps: InnerSteps, by_position: StepsByPosition | None, drift: Mapping[int, Sequence[float]]) -> Health:
    """Sums up what a measurement has kept; `drift` maps tokens read to the distances of all documents."""
    powers = [position for position in sorted(drift) if position & (position - 1) == 0]
    shown = powers or sorted(drift)[-1:]
    curve = [(p, ratio(np.array(drift[p]), np.ones(len(drift[p])))) for p in sorted(drift)]
    return Health(
        steps=steps.count,
        mean_gradient_norm=steps.mean,
        largest_gradient_norm=steps.largest,
        clipped_share=steps.clipped_share,
        drift=[(position, float(np.mean(drift[position]))) for position in shown],
        by_position=[] if by_position is None else by_position.bins(),
        drift_by_position=[(position, estimate) for position, estimate in curve if estimate],
    )


def settle(
    document: str, nll: np.ndarray, scored: np.ndarray, norms: np.ndarray, *, start: int, M: int
) -> tuple[np.ndarray, Divergence | None]:
    """A piece of one text with infinity for every scored loss that is not finite, and the first place of that kind.

    Args:
        nll, scored: [n] of the tokens start, start + 1, …; the first token of all has no loss and keeps its NaN.
        norms: of the gradients of the steps that the text took in this piece; [0] if it was read frozen.
    """
    lost = scored & ~np.isfinite(nll)
    lost[: 1 if start == 0 else 0] = False
    nll = np.where(lost, np.inf, nll)
    first_step = max(0, start - 1) // M
    broken = np.flatnonzero(~np.isfinite(norms))
    places = [start + int(np.flatnonzero(lost)[0])] if lost.any() else []
    places += [int((first_step + broken[0] + 1) * M)] if len(broken) else []
    if not places:
        return nll, None
    position = min(places)
    taken = norms[: max(0, math.ceil(position / M) - first_step)]
    newest = float(norms[broken[0]]) if len(broken) else float(taken[-1]) if len(taken) else None
    return nll, Divergence(document, position, newest)
