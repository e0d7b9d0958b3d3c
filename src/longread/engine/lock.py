"""The lock over all that an engine knows of its sessions: held for bookkeeping, never while anything is computed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

LOG = logging.getLogger(__name__)


class RecordsLock:
    """A lock that can be waited on. The thread that computes holds it but for the moments in which it computes."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())

    def __enter__(self) -> None:
        self._changed.acquire()

    def __exit__(self, *error: object) -> None:
        self._changed.release()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Lets others in while something is computed. For whoever holds it once."""
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    def notify(self) -> None:
        """Wakes whoever waits: something has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for a change, with the lock held before and after."""
        self._changed.wait(seconds)

    def run(self, work: Callable[[], object]) -> None:
        """Does a piece of bookkeeping in the thread that calls, which something else has made necessary."""
        with self._changed:
            try:
                work()
            except Exception:
                LOG.exception("a piece of the engine's bookkeeping failed")
            self._changed.notify_all()
