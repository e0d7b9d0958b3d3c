"""The figures of a reading as a text of fixed width: a later command that goes on with the session adds to them."""

from __future__ import annotations

import base64
import math

import numpy as np

from longread.evaluate import Divergence, Measurement

MOST_DRIFTS = 48
"""Positions at which the drift is known: one for each octave, and the newest."""


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
