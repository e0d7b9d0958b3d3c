"""Mean losses of a session by position, in a bounded number of bins, however much it reads."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_BINS = 512


@dataclass
class Curve:
    """Losses by position, in bins of `width` tokens that are cut at multiples of it.

    A bin is one token wide at first; whenever there would be more than `MOST_BINS`, two become one.
    """

    first: int = 0
    """Position from which on losses are known; a session from a file begins where the file ends."""
    end: int = 0
    width: int = 1
    sums: array[float] = field(default_factory=lambda: array("d"))
    """Of the losses in a bin, nats."""
    scored: array[float] = field(default_factory=lambda: array("d"))
    """Tokens with a loss: not the first of all, nor what is no finite number."""
    written: array[float] = field(default_factory=lambda: array("d"))
    """Tokens that the session wrote itself; they have no loss here."""

    @classmethod
    def beginning(cls, position: int) -> Curve:
        """The curve of a session of whose past nothing is known."""
        return cls(first=position, end=position)

    def add(self, nll: Sequence[float]) -> None:
        """The next tokens have been read with these losses."""
        for i, part in self._places(len(nll)):
            finite = [x for x in nll[part] if math.isfinite(x)]
            self.sums[i] += sum(finite)
            self.scored[i] += len(finite)

    def add_written(self, count: int) -> None:
        """The session has written the next tokens."""
        for i, part in self._places(count):
            self.written[i] += part.stop - part.start

    def _places(self, count: int) -> Iterator[tuple[int, slice]]:
        """Bins of the next tokens, and which of the tokens belong to each."""
        begin, self.end = self.end, self.end + count
        while self.end > self.first and self._bin(self.end - 1) >= MOST_BINS:
            self._halve()
        missing = [0.0] * (self._bin(self.end - 1) + 1 - len(self.sums)) if self.end > self.first else []
        for values in self._lists:
            values.extend(missing)
        at = begin
        while at < self.end:
            stop = min(self.end, (at // self.width + 1) * self.width)
            yield self._bin(at), slice(at - begin, stop - begin)
            at = stop

    @property
    def _lists(self) -> tuple[array[float], array[float], array[float]]:
        return self.sums, self.scored, self.written

    def _bin(self, position: int) -> int:
        return position // self.width - self.first // self.width

    def _halve(self) -> None:
        odd = self.first // self.width % 2 == 1  # then the first bin is the second half of one
        self.width *= 2
        self.sums, self.scored, self.written = (_pairs(values, odd) for values in self._lists)

    def copy(self, width: int = 1) -> Curve:
        """The same, for somebody else; in bins of at least `width` tokens."""
        other = Curve(self.first, self.end, self.width, self.sums[:], self.scored[:], self.written[:])
        while other.width < width:
            other._halve()
        return other

    def bins(self) -> Iterator[tuple[int, int, float | None, int, int]]:
        """Of each bin: position of its first token, tokens, mean loss, tokens that have one, tokens written."""
        for i, (total, scored, written) in enumerate(zip(*self._lists, strict=True)):
            begin = (self.first // self.width + i) * self.width
            start, stop = max(self.first, begin), min(self.end, begin + self.width)
            yield start, stop - start, total / scored if scored else None, int(scored), int(written)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        lists = {name: list(getattr(self, name)) for name in ("sums", "scored", "written")}
        return {"first": self.first, "end": self.end, "width": self.width} | lists

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Curve:
        """What `as_json` gave. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        numbers = (int(values[name]) for name in ("first", "end", "width"))
        curve = cls(*numbers, *(array("d", values[name]) for name in ("sums", "scored", "written")))  # type: ignore[arg-type]
        if not len(curve.sums) == len(curve.scored) == len(curve.written) <= MOST_BINS:
            raise ValueError("lists of different lengths")
        return curve


def _pairs(values: Sequence[float], odd: bool) -> array[float]:
    """Sums of two neighbours each; `odd`: the first stands alone."""
    padded = [0.0, *values] if odd else list(values)
    return array("d", (sum(padded[i : i + 2]) for i in range(0, len(padded), 2)))
