"""Where a long reading can stand still for a moment, so that whoever called it can do something else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from longread.model import Transformer

STEP = 3
"""A mini-batch with its step is so many passes of the upper half: one forward, and backward twice as much."""


class Pauses:
    """Calls `pause` whenever a mini-batch's work has been done since it was called last, and more is to come.

    Work is parameters times tokens of a sequence, not time: so a reading always pauses in the same places.
    """

    def __init__(self, model: Transformer, pause: Callable[[], None] | None, *, learn: bool) -> None:
        self._pause = pause
        if pause is None:
            return
        self._done = 0.0
        self._upper = sum(p.numel() for p in model.upper_parameters()) + model.config.num_fast_weights
        self._lower = sum(p.numel() for block in model.prefix for p in block.parameters())
        self._lower_parts, self._upper_parts = len(model.prefix) + len(model.suffix[:1]), len(model.suffix) + 1
        self._most = model.config.mini_batch_size * (self._lower + self._upper * (STEP if learn else 1))

    def in_lower(self, tokens: int) -> Callable[[], None] | None:
        """What `Transformer.lower` calls before each of its blocks."""
        return functools.partial(self._before, self._lower * tokens / self._lower_parts) if self._pause else None

    def in_upper(self, tokens: int) -> Callable[[], None] | None:
        """What `Transformer.upper` calls before each of its blocks; to be called once more before the head."""
        return functools.partial(self._before, self._upper * tokens / self._upper_parts) if self._pause else None

    def after_lower(self, tokens: int) -> None:
        """After all of the lower half, where another thread has computed it."""
        if self._pause:
            self._before(self._lower * tokens)

    @contextlib.contextmanager
    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """While reading stands still only within such a context."""
        pause = self._pause
        self._pause = pause and functools.partial(_call_within, context, pause)
        try:
            yield
        finally:
            self._pause = pause

    def before_passes(self, passes: int, tokens: int) -> None:
        """Before all of the upper half and the head, so many times."""
        if self._pause:
            self._before(self._upper * passes * tokens)

    def _before(self, work: float) -> None:
        if self._pause is not None and self._done >= self._most:
            self._done %= self._most
            self._pause()
        self._done += work


def _call_within(context: Callable[[], AbstractContextManager[None]], pause: Callable[[], None]) -> None:
    with context():
        pause()
