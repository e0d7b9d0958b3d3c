"""From sums to figures: every loss with its interval, side by side for any number of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from longread.config import UserError
from longread.evaluate.estimate import Estimate, ratio
from longread.evaluate.health import Divergence, Health, health
from longread.evaluate.measure import Measurement
from longread.evaluate.positions import PositionLoss, octaves

FORMAT = "longread-evaluation/1"

DIFFERENT_TOKENIZERS = (
    "The models have different tokenizers, so losses are bits per byte and positions are bytes: every model is scored "
    "on the same bytes of each text, a token's loss lies evenly on its bytes."
)

Sums: TypeAlias = tuple[float, float, int]


@dataclass(frozen=True, slots=True)
class Score:
    """A mean loss; bits per byte compare models of different tokenizers and are None where bytes are unknown."""

    nats_per_token: Estimate
    """Of the model's own tokens."""
    bits_per_byte: Estimate | None


@dataclass(frozen=True, slots=True)
class PositionScore:
    """The loss at positions start … end - 1 (position t predicts token t + 1, or is byte t)."""

    start: int
    end: int
    score: Score


@dataclass(frozen=True, slots=True)
class LengthScore:
    """Documents of at least `context_length` positions: the loss over all of it, and over its last half alone."""

    context_length: int
    score: Score
    last_half: Score
    gain_over_frozen: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one model in one way of reading: learning, frozen, or static (it has no fast weights)."""

    model: str
    reading: str
    parameters: int
    fast_weights: int
    tokens: int
    seconds: float
    loss: Score
    gain_over_frozen: Estimate | None
    """The gain of learning over the same weights read frozen, paired by document, in the evaluation's unit."""
    by_position: list[PositionScore]
    curve: list[PositionScore]
    """The same in finer, log-spaced bins, for plots."""
    by_context_length: list[LengthScore]
    at_index: list[PositionScore]
    health: Health | None
    diverged: list[Divergence]
    """Documents whose losses are infinite from some position on."""

    @property
    def label(self) -> str:
        return self.model if self.reading == "static" else f"{self.model}, {self.reading}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All results on one set of documents, with what is needed to read them."""

    results: list[Result]
    documents: int
    tokens: int | None
    """None where the models have different tokenizers: each result has its own."""
    bytes: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def by_byte(self) -> bool:
        """Whether losses are bits per byte, and positions bytes, because the tokenizers differ."""
        return self.tokens is None

    @property
    def unit(self) -> str:
        """The unit in which losses are compared."""
        return "bits per byte" if self.by_byte else "nats per token"

    @property
    def positions(self) -> str:
        """The unit of positions and context lengths."""
        return "bytes" if self.by_byte else "tokens"

    @property
    def amount(self) -> str:
        """How much text it is, for a reader."""
        size = self.bytes or 0 if self.tokens is None else self.tokens
        return f"{self.documents} document{'' if self.documents == 1 else 's'}, {size:,} {self.positions}"

    def speed(self, result: Result) -> str:
        """Tokens, or bytes, a second, for a reader."""
        size = self.bytes or 0 if self.tokens is None else result.tokens
        return f"{size / result.seconds:,.0f}" if result.seconds else "–"

    def loss(self, score: Score) -> Estimate:
        """The figure of `score` that models are compared by."""
        return score.bits_per_byte if self.by_byte and score.bits_per_byte else score.nats_per_token

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`: no NaN, no infinity; it names units that are not those of one tokenizer."""
        table: dict[str, Any] = {"format": FORMAT, "confidence": 0.95, "unit_of_sampling": "document"}
        table |= {"unit": self.unit, "positions": self.positions} if self.by_byte else {}
        return finite(table | asdict(self))


def summarize(
    measurements: Sequence[Measurement],
    *,
    lengths: Sequence[int] = (),
    indices: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> Evaluation:
    """Turns measurements of the same documents, made with the same `lengths` and `indices` as edges, into figures.

    A learning measurement is paired with the frozen one of the same model name, if there is one.

    Raises:
        UserError: models with different tokenizers were measured by their own tokens; see `in_common`.
    """
    frozen = {m.model: m for m in measurements if m.reading == "frozen"}
    results = [
        _result(m, frozen.get(m.model) if m.reading == "learning" else None, lengths, indices) for m in measurements
    ]
    by_byte = _by_byte(measurements)
    first = measurements[0].losses if measurements else []
    num_bytes = int(sum(loss.bytes.sum() for loss in first))
    return Evaluation(
        results,
        len(first),
        None if by_byte else sum(loss.tokens_read for loss in first),
        num_bytes or None,
        [*notes, *([DIFFERENT_TOKENIZERS] if by_byte else []), *_divergences(results)],
    )


def _by_byte(measurements: Sequence[Measurement]) -> bool:
    """Whether losses were counted by byte; if not, all must have read the same tokens."""
    if any(loss.by_byte for m in measurements for loss in m.losses):
        return True
    counts = [[loss.tokens_read for loss in m.losses] for m in measurements]
    other = next((m for m, count in zip(measurements, counts, strict=True) if count != counts[0]), None)
    if other:
        raise UserError(
            f"{other.model} read other tokens than {measurements[0].model}, so their losses per token cannot be "
            "compared; measure both on documents from in_common"
        )
    return False


def _divergences(results: Sequence[Result]) -> list[str]:
    return [
        f"{result.label}: {len(result.diverged)} of the readings were no longer finite, the first {first}; losses from "
        "there on count as infinite."
        for result in results
        if (first := min(result.diverged, key=lambda found: found.position, default=None))
    ]


def default_lengths(longest: int, smallest: int = 1024) -> list[int]:
    """Powers of two from `smallest` to the longest that a text of `longest` positions still fills."""
    lengths = []
    while smallest <= longest:
        lengths.append(smallest)
        smallest *= 2
    return lengths


def _result(m: Measurement, frozen: Measurement | None, lengths: Sequence[int], indices: Sequence[int]) -> Result:
    longest = max((loss.num_positions for loss in m.losses), default=0)
    edges = [int(edge) for edge in m.losses[0].edges if edge <= longest] if m.losses else [0]
    if edges[-1] < longest and m.losses:
        edges.append(int(m.losses[0].edges[len(edges)]))
    return Result(
        model=m.model,
        reading=m.reading,
        parameters=m.num_parameters,
        fast_weights=m.num_fast_weights,
        tokens=m.tokens,
        seconds=m.seconds,
        loss=_score(m.losses, PositionLoss.total) or _NOTHING,
        gain_over_frozen=_gain(m.losses, frozen.losses, PositionLoss.total) if frozen else None,
        by_position=_by_position(m.losses, octaves(longest), longest),
        curve=_by_position(m.losses, list(pairwise(edges)), longest),
        by_context_length=[
            score for T in sorted(lengths) if (score := _at_length(m.losses, frozen.losses if frozen else None, T))
        ],
        at_index=_by_position(m.losses, [(i, i + 1) for i in indices], longest),
        health=health(m.inner_steps, m.steps_by_position, m.drift) if m.reading == "learning" else None,
        diverged=m.diverged,
    )


_NOTHING = Score(Estimate(math.nan, None, None, 0), None)


def _score(losses: Sequence[PositionLoss], sums: Callable[[PositionLoss], Sums]) -> Score | None:
    table = np.array([sums(loss) for loss in losses], dtype=float).reshape(-1, 3)
    nats = ratio(table[:, 0], table[:, 1])
    bits = ratio(table[:, 0] / math.log(2), table[:, 2])
    return Score(nats, bits) if nats else None


def _gain(
    learning: Sequence[PositionLoss], frozen: Sequence[PositionLoss], sums: Callable[[PositionLoss], Sums]
) -> Estimate | None:
    by_byte = any(loss.by_byte for loss in learning)
    pairs = [(sums(f)[0] - sums(a)[0], sums(a)[2 if by_byte else 1]) for a, f in zip(learning, frozen, strict=True)]
    gain = ratio(*np.array(pairs).reshape(-1, 2).T)
    return gain.scaled(1 / math.log(2)) if gain and by_byte else gain


def _by_position(losses: Sequence[PositionLoss], bins: Sequence[tuple[int, int]], longest: int) -> list[PositionScore]:
    scores = []
    for start, end in bins:
        score = _score(losses, lambda loss, start=start, end=end: loss.between(start, end))  # type: ignore[misc]
        if score:
            scores.append(PositionScore(start, min(end, longest), score))
    return scores


def _at_length(losses: Sequence[PositionLoss], frozen: Sequence[PositionLoss] | None, T: int) -> LengthScore | None:
    enough = [i for i, loss in enumerate(losses) if loss.num_positions >= T]
    kept = [losses[i] for i in enough]
    whole = _score(kept, lambda loss: loss.between(0, T))
    last = _score(kept, lambda loss: loss.between(T // 2, T))
    if not whole or not last:
        return None
    gain = _gain(kept, [frozen[i] for i in enough], lambda loss: loss.between(0, T)) if frozen else None
    return LengthScore(T, whole, last, gain)


def finite(value: Any) -> Any:
    """Plain data as JSON knows it: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
