"""Sessions that read the same pieces, learning and frozen, and the figures of what they read.

The figures are kept with the session, as a text of fixed width: a later command that goes on with it adds to them.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from longread.cli.reading.pieces import TokenPiece
from longread.evaluate import Divergence, InnerSteps, Measurement, PositionLoss, bin_edges, settle
from longread.loading import OpenModel
from longread.session import Session, TextPrefix

MOST_DRIFTS = 48
"""Positions at which the drift is known: one for each octave, and the newest."""


class _ReadPiece(NamedTuple):
    """A session that has read a piece, and what that gave."""

    session: Session
    nll: np.ndarray
    norms: np.ndarray
    seconds: float


class MeasuredSession:
    """A session, and the figures of what it reads in this command and read in those that it goes on from."""

    def __init__(self, opened: OpenModel, session: Session) -> None:
        config = opened.model.config
        self.session = session
        self.measurement = Measurement(
            opened.name,
            session.learn and config.num_suffix_blocks > 0,
            [PositionLoss(bin_edges())],
            InnerSteps(opened.inner.clip),
            config.num_parameters,
            config.num_fast_weights,
        )

    def read_fork(self, ids: list[int]) -> _ReadPiece:
        """Reads tokens on a fork: nothing here changes."""
        started, fork = time.perf_counter(), self.session.fork()
        nll = fork.read(ids).double().cpu().numpy()
        norms = fork.inner_grad_norms.double().cpu().numpy()
        return _ReadPiece(fork, nll, norms, time.perf_counter() - started)

    def keep(self, found: _ReadPiece, piece: TokenPiece) -> None:
        """Makes what `read_fork` gave its own."""
        measurement, start = self.measurement, self.session.position
        M = self.session.model.config.mini_batch_size
        scored = np.ones(len(piece.ids), dtype=bool)
        nll, broken = settle("the text", found.nll, scored, found.norms, start=start, M=M)
        if broken and not measurement.diverged:
            measurement.diverged.append(broken)
        self.session = found.session
        measurement.seconds += found.seconds
        measurement.tokens += len(piece.ids)
        measurement.losses[0].add(nll, np.array(piece.byte_lengths))
        measurement.inner_steps.add(found.norms)
        add_drift(measurement, self.session.position, self.session.drift())


class Readers:
    """The session that learns, and beside it the same weights frozen, if that is wanted."""

    def __init__(self, opened: OpenModel, session: Session, *, control: bool) -> None:
        self._all = [MeasuredSession(opened, session)]
        if control and session.learn and opened.model.config.num_suffix_blocks:
            frozen = session.fork()
            frozen.learn = False
            self._all.append(MeasuredSession(opened, frozen))

    @property
    def session(self) -> Session:
        """The one that learns."""
        return self._all[0].session

    @property
    def measurements(self) -> Sequence[Measurement]:
        """Of each reader, the learning one first."""
        return [reader.measurement for reader in self._all]

    def go_on(self, begun: TextPrefix) -> list[str]:
        """Takes over the figures that were kept with the session; what is to be said about those that come."""
        if unpack_into(self._all[0].measurement, begun.figures, "the text"):
            return []
        return [f"The figures are about the text from byte {begun.num_bytes:,} on, not about what was read before."]

    def look(self, piece: TokenPiece) -> list[_ReadPiece]:
        """All readers read a piece, and nothing changes: whatever goes wrong, nothing is half-read."""
        return [reader.read_fork(piece.ids) for reader in self._all]

    def keep(self, found: list[_ReadPiece], piece: TokenPiece) -> None:
        """Counts what `look` gave."""
        for reader, one in zip(self._all, found, strict=True):
            reader.keep(one, piece)
        self._say(piece.prefix)

    def finish(self) -> None:
        """The texts have ended: what comes later begins a segment of its own."""
        text = self.session.text
        if text is not None:
            self._say(replace(text, whole=True, segment_position=text.position, segment_bytes=text.num_bytes))

    def _say(self, prefix: TextPrefix) -> None:
        self.session.text = replace(prefix, figures=packed(self._all[0].measurement))


def packed(measurement: Measurement) -> str:
    """The sums of one text, as ASCII whose length does not depend on how long the text is."""
    (loss,), steps = measurement.losses, measurement.inner_steps
    found = next(iter(measurement.diverged), None)
    norm = math.nan if found is None or found.gradient_norm is None else found.gradient_norm
    positions, drifts = np.full(MOST_DRIFTS, -1), np.full(MOST_DRIFTS, np.nan)
    for i, (position, (drift,)) in enumerate(measurement.drift.items()):
        positions[i], drifts[i] = position, drift
    counts = [loss.tokens_read, measurement.tokens, steps.count, steps.clipped, -1 if found is None else found.position]
    numbers = [measurement.seconds, steps.total, steps.largest, norm]
    whole = np.concatenate([np.array(counts), loss.tokens, loss.bytes, positions]).astype("<i8")
    real = np.concatenate([np.array(numbers), loss.nats, drifts]).astype("<f8")
    return base64.b64encode(whole.tobytes() + real.tobytes()).decode()


def unpack_into(measurement: Measurement, text: str, document: str) -> bool:
    """Sets a measurement that has counted nothing to what `packed` gave, and says whether it is such a text."""
    (loss,), steps = measurement.losses, measurement.inner_steps
    bins = len(loss.nats)
    sizes = [5, bins, bins, MOST_DRIFTS, 4, bins, MOST_DRIFTS]
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    if len(data) != 8 * sum(sizes):
        return False
    border = 8 * sum(sizes[:4])
    whole, real = np.frombuffer(data[:border], "<i8"), np.frombuffer(data[border:], "<f8")
    counts, tokens, num_bytes, positions = np.split(whole, np.cumsum(sizes[:3]))
    numbers, nats, drifts = np.split(real, np.cumsum(sizes[4:6]))
    loss.tokens_read, measurement.tokens, steps.count, steps.clipped, diverged = counts.tolist()
    measurement.seconds, steps.total, steps.largest, norm = numbers.tolist()
    loss.tokens, loss.bytes, loss.nats = tokens.copy(), num_bytes.copy(), nats.copy()
    measurement.drift = {p: [d] for p, d in zip(positions.tolist(), drifts.tolist(), strict=True) if p >= 0}
    if diverged >= 0:
        measurement.diverged = [Divergence(document, diverged, None if math.isnan(norm) else norm)]
    return True


def add_drift(measurement: Measurement, position: int, drift: float) -> None:
    """Keeps the drift at the first known position of each octave, and the newest."""
    if not math.isfinite(drift):
        return
    known = measurement.drift
    newest = max(known, default=0)
    if any(p < newest and p.bit_length() == newest.bit_length() for p in known):
        del known[newest]
    known[position] = [drift]
