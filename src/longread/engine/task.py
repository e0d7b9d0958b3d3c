"""Work that an engine has accepted: its events as they come, its result, and a way to stop it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

Callback = Callable[[Any], None]


class Task:
    """One append, generation or score under way.

    Events go to whoever asks: to all subscribers if there are any, else they wait for the iterator. The last thing a
    subscriber is given is the outcome: the result, or the exception.
    """

    def __init__(self) -> None:
        lock = threading.RLock()
        self._changed, self._ended = threading.Condition(lock), threading.Condition(lock)
        self._events: deque[Any] = deque()
        self._subscribers: list[Callback] = []
        self._outcome: Any = None
        self._done = False
        self.cancelled = False
        """Whether somebody has asked it to stop."""
        self._wake: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done

    def cancel(self) -> None:
        """Asks it to stop: a text being read at the end of the mini-batch, a text being written after this token."""
        self.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result. Raises what went wrong, or `TimeoutError` after `timeout` seconds."""
        with self._changed:
            if not self._ended.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"the task is not finished after {timeout} seconds")
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def __iter__(self) -> Iterator[Any]:
        """Events, in order, until there is an outcome; `result` gives it, and raises what went wrong."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._done)
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    def subscribe(self, callback: Callback) -> None:
        """Calls `callback` with every event, and then with the outcome; in the engine's thread, so it must not wait."""
        with self._changed:
            waiting = list(self._events)
            self._events.clear()
            if self._done:
                waiting.append(self._outcome)
            self._subscribers.append(callback)
            for event in waiting:
                self._tell(callback, event)

    def _emit(self, event: Any) -> None:
        with self._changed:
            if self._done:
                return
            if not self._subscribers:
                self._events.append(event)
                self._changed.notify_all()
            for callback in list(self._subscribers):
                self._tell(callback, event)

    def _finish(self, outcome: Any) -> None:
        with self._changed:
            if self._done:
                return
            self._outcome, self._done = outcome, True
            self._changed.notify_all()
            self._ended.notify_all()
            for callback in list(self._subscribers):
                self._tell(callback, outcome)

    def _tell(self, callback: Callback, event: Any) -> None:
        """A subscriber that fails, because its connection is gone say, hears no more; the engine goes on."""
        try:
            callback(event)
        except Exception:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)
