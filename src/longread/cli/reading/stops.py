"""Signals that end a reading: heard at once, obeyed where nothing is half-done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

from longread.signals import Requests

T = TypeVar("T")
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Stop(KeyboardInterrupt):
    """A signal has asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.exit_status = number, 128 + number


class StopSignals:
    """While it is entered, SIGINT, SIGTERM and SIGHUP raise `Stop`, one each: within `open`, or when it begins next.

    A signal and its echo are one. The first signal is answered on stderr at once, whatever is being done. Outside the
    main thread, where Python delivers no signals, it does nothing; a signal that the process ignores (nohup) stays
    ignored.

    Args:
        answer: what to say to the first signal, and to each that follows it; nothing if that is empty.
    """

    def __init__(self, answer: Callable[[bool], str]) -> None:
        self.number: int | None = None
        """Of the signal that came first."""
        self._answer = answer
        self._open = False
        self._heard = self._obeyed = 0
        self._newest: int = signal.SIGINT
        self._requests = Requests()
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """Of the signal that came first, as people say it."""
        return _NAMES[signal.Signals(self.number)] if self.number else ""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Whatever is done here may be left at any point."""
        self._open = True
        try:
            if self._heard > self._obeyed:
                self._raise()
            yield
        finally:
            self._open = False

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; waiting for each may be left at any point."""
        iterator = iter(items)
        while True:
            with self.open():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._requests.is_new(number):
            return
        if answer := self._answer(self.number is None):
            with contextlib.suppress(OSError):  # not by print: what is interrupted may be in the middle of one
                clear = "\r\x1b[K" if os.isatty(2) else ""
                os.write(2, f"{clear}{answer}\n".encode())
        self.number = self.number or number
        self._newest = number
        self._heard += 1
        if self._open:
            self._raise()

    def _raise(self) -> None:
        self._obeyed += 1
        raise Stop(self._newest)
