"""Losses of a text as they come, and as a session keeps them, beside those of a frozen twin, in bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longread.engine import Curve

LOG_2 = math.log(2)


class Losses:
    """What one reader, or a reader and its frozen twin, made of a text.

    Args:
        start: position of the first token.
        byte_lengths: UTF-8 bytes of each token; None where the client sent token ids.
        bin_size: tokens of a bin; bins are cut at multiples of it. None: no bins.
        total: tokens that are to be read.
        twin: whether a twin reads along.
    """

    def __init__(
        self, start: int, byte_lengths: Sequence[int] | None, *, bin_size: int | None, total: int, twin: bool
    ) -> None:
        self.start, self._lengths, self._bin, self._total = start, byte_lengths, bin_size, total
        self._nll: list[float] = []
        self._frozen: list[float] | None = [] if twin else None
        self._shown = 0  # tokens whose bins have been taken

    def add(self, nll: Sequence[float]) -> None:
        """More of what the reader found."""
        self._nll += nll

    def add_frozen(self, nll: Sequence[float]) -> None:
        """More of what the twin found."""
        if self._frozen is not None:
            self._frozen += nll

    def drop_twin(self) -> None:
        """Forgets a twin that could not read along."""
        self._frozen = None

    @property
    def tokens(self) -> int:
        """How many have been read by all who read."""
        return min(len(self._nll), len(self._nll if self._frozen is None else self._frozen))

    def num_bytes(self, tokens: int) -> int | None:
        """UTF-8 bytes of the first tokens; None where the client sent token ids."""
        return None if self._lengths is None else sum(self._lengths[:tokens])

    def means(self) -> dict[str, Any]:
        """Mean losses of everything that all have read, in nats per token, and bits per byte."""
        end = self.tokens
        nll = _mean(self._nll[:end])
        frozen = None if self._frozen is None else _mean(self._frozen[:end])
        return {
            "nll": nll,
            "frozen_nll": frozen,
            "gain": None if frozen is None or nll is None else frozen - nll,
            "bits_per_byte": self._bits(end),
        }

    def _bits(self, end: int) -> float | None:
        if self._lengths is None:
            return None
        nats, num_bytes = 0.0, 0
        for nll, length in zip(self._nll[:end], self._lengths[:end], strict=True):
            if math.isfinite(nll):
                nats, num_bytes = nats + nll, num_bytes + length
        return nats / LOG_2 / num_bytes if num_bytes else None

    def new_bins(self, *, final: bool) -> dict[str, Any] | None:
        """Bins that are complete and have not been taken yet; with `final` the unfinished last one too."""
        if self._bin is None:
            return None
        end = self.tokens
        if not final and end < self._total:
            end = max(self._shown, (self.start + end) // self._bin * self._bin - self.start)
        bins: dict[str, Any] = {"start": [], "tokens": [], "bytes": None, "nll": [], "frozen_nll": None}
        if self._lengths is not None:
            bins["bytes"] = []
        if self._frozen is not None:
            bins["frozen_nll"] = []
        while self._shown < end:
            first = self._shown
            last = min(end, ((self.start + first) // self._bin + 1) * self._bin - self.start)
            bins["start"].append(self.start + first)
            bins["tokens"].append(last - first)
            bins["nll"].append(_mean(self._nll[first:last]))
            if self._lengths is not None:
                bins["bytes"].append(sum(self._lengths[first:last]))
            if self._frozen is not None:
                bins["frozen_nll"].append(_mean(self._frozen[first:last]))
            self._shown = last
        return bins


def kept(own: Curve, frozen: Curve | None) -> dict[str, list[Any] | None]:
    """The losses that a session keeps, beside its twin's, in the bins of the coarser of the two."""
    width = max(own.width, 0 if frozen is None else frozen.width)
    bins = list(own.copy(width).bins())
    of_frozen = {} if frozen is None else {start: mean for start, _, mean, _, _ in frozen.copy(width).bins()}
    columns = [list(column) for column in zip(*bins, strict=True)] or [[], [], [], [], []]
    return dict(zip(("start", "tokens", "nll", "scored", "written"), columns, strict=True)) | {
        "frozen_nll": None if frozen is None else [of_frozen.get(start) for start in columns[0]]
    }


def _mean(values: Sequence[float]) -> float | None:
    """Of what is a number; the first token of all is predicted by nothing."""
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else None
