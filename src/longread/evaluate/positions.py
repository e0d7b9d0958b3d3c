"""Where in a text a loss occurred: sums in position bins, constant memory for a text of any length.

Position t is the prediction of token t + 1 from tokens 0 … t, so a context of T tokens has positions 0 … T - 1. Where
models of different tokenizers read the same text, no token is common to them: there position t is byte t.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

FIRST_EDGE = 16  # below this many tokens, positions are too few to tell apart
LONGEST = 2**40
BINS_PER_OCTAVE = 4


def bin_edges(lengths: Iterable[int] = (), indices: Iterable[int] = ()) -> np.ndarray:
    """Log-spaced edges that hold every power of two from `FIRST_EDGE`, each length and its half, a bin per index."""
    edges = {0, LONGEST}
    edge = float(FIRST_EDGE)
    while edge < LONGEST:
        edges.add(round(edge))
        edge *= 2 ** (1 / BINS_PER_OCTAVE)
    for length in lengths:
        edges.update((length, length // 2))
    for index in indices:
        edges.update((index, index + 1))
    return np.array(sorted(edges), dtype=np.int64)


def octaves(longest: int) -> list[tuple[int, int]]:
    """Bins for a table: 0-128, 128-256, 256-512, …, up to `longest`; they start lower for short texts."""
    edge = 128
    while edge > FIRST_EDGE and edge * 4 > longest:
        edge //= 2
    edges = [0, edge]
    while edges[-1] < longest:
        edges.append(edges[-1] * 2)
    return list(pairwise(edges))


class PositionLoss:
    """The losses of one document, or of one endless stream, summed in position bins."""

    by_byte = False

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self.nats = np.zeros(len(edges) - 1)
        self.tokens: np.ndarray = np.zeros(len(edges) - 1, dtype=np.int64)
        self.bytes = np.zeros(len(edges) - 1, dtype=np.int64)
        self.tokens_read = 0

    def add(self, nll: np.ndarray, byte_lengths: np.ndarray | None = None) -> None:
        """Takes the next tokens of the text.

        Args:
            nll: [n] nats; NaN for a token that is not scored (the first of a text, a document boundary).
            byte_lengths: [n] UTF-8 bytes that each token covers; without it there are no bits per byte.
        """
        positions = self.tokens_read - 1 + np.arange(len(nll))
        self.tokens_read += len(nll)
        scored = ~np.isnan(nll) & (positions >= 0)
        bins = np.searchsorted(self.edges, positions[scored], side="right") - 1
        np.add.at(self.nats, bins, nll[scored])
        np.add.at(self.tokens, bins, 1)
        if byte_lengths is not None:
            np.add.at(self.bytes, bins, byte_lengths[scored])

    @property
    def num_positions(self) -> int:
        """Positions passed so far: one fewer than tokens read."""
        return max(0, self.tokens_read - 1)

    def between(self, start: int, end: int) -> tuple[float, float, int]:
        """Nats, tokens and bytes at positions start … end - 1; both must be edges."""
        first, last = np.searchsorted(self.edges, (start, end))
        return self._sums(slice(int(first), int(last)))

    def total(self) -> tuple[float, float, int]:
        """Nats, tokens and bytes of everything read so far."""
        return self._sums(slice(None))

    def _sums(self, bins: slice) -> tuple[float, float, int]:
        return float(self.nats[bins].sum()), self.tokens[bins].sum().item(), int(self.bytes[bins].sum())


class BytePositionLoss(PositionLoss):
    """The same for models of different tokenizers: position t is byte t of the text, and a token's nats lie evenly on
    its bytes, so that a bin holds the same text whatever the tokens are. A token without bytes belongs to the next.

    Args:
        span: the first byte that counts and the one after the last. The first token of a text has no loss; where that
            is BOS for some models only, the others score fewer bytes.
    """

    by_byte = True

    def __init__(self, edges: np.ndarray, span: tuple[int, int]) -> None:
        super().__init__(edges)
        self.tokens = np.zeros(len(edges) - 1)
        self.span = span
        self.bytes_read = 0

    def add(self, nll: np.ndarray, byte_lengths: np.ndarray | None = None) -> None:
        """As in `PositionLoss`. Raises `ValueError` without `byte_lengths`."""
        if byte_lengths is None:
            raise ValueError("losses can be counted by byte only where the bytes of each token are known")
        first, last = self.span
        ends = self.bytes_read + np.cumsum(byte_lengths)
        begins = ends - byte_lengths
        scored = ~np.isnan(nll) & (self.tokens_read + np.arange(len(nll)) > 0)
        self.tokens_read += len(nll)
        self.bytes_read = int(ends[-1]) if len(ends) else self.bytes_read
        if first >= last:
            return
        whole = scored & (byte_lengths == 0) & (begins >= first) & (begins <= last)
        bins = self._bin(np.minimum(begins[whole], last - 1))
        np.add.at(self.nats, bins, nll[whole])
        np.add.at(self.tokens, bins, 1)
        begins, ends = begins.clip(first, last), ends.clip(first, last)
        while len(parts := np.flatnonzero(scored & (begins < ends))):  # what a token has in one bin, then in the next
            bins = self._bin(begins[parts])
            until = np.minimum(ends[parts], self.edges[bins + 1])
            sizes = until - begins[parts]
            np.add.at(self.nats, bins, nll[parts] * (sizes / byte_lengths[parts]))
            np.add.at(self.tokens, bins, sizes / byte_lengths[parts])
            np.add.at(self.bytes, bins, sizes)
            begins[parts] = until

    def _bin(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, positions, side="right") - 1

    @property
    def num_positions(self) -> int:
        """Bytes passed so far."""
        return min(self.bytes_read, self.span[1])
