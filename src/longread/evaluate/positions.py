"""Where in a text a loss occurred: sums in position bins, constant memory for a text of any length.

Position t is the prediction of token t + 1 from tokens 0 … t, so a context of T tokens has positions 0 … T - 1.
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

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self.nats = np.zeros(len(edges) - 1)
        self.tokens = np.zeros(len(edges) - 1, dtype=np.int64)
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

    def between(self, start: int, end: int) -> tuple[float, int, int]:
        """Nats, tokens and bytes at positions start … end - 1; both must be edges."""
        first, last = np.searchsorted(self.edges, (start, end))
        span = slice(int(first), int(last))
        return float(self.nats[span].sum()), int(self.tokens[span].sum()), int(self.bytes[span].sum())

    def total(self) -> tuple[float, int, int]:
        """Nats, tokens and bytes of everything read so far."""
        return float(self.nats.sum()), int(self.tokens.sum()), int(self.bytes.sum())
