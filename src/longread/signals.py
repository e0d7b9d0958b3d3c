"""Signals that ask a program to end: a signal and its echo are one request.

`timeout` sends its signal to the command and then once more to the command's process group. A terminal sends Ctrl-C to
a whole group, in which a parent may pass it on. Whoever counts these as two hurries, or gives up, at the first request.
"""

from __future__ import annotations

import time

ECHO = 0.1
"""Seconds in which the same signal again is an echo; a hand is slower."""
_LINGER = 0.05
"""Seconds that a first signal waits for its echo, which would otherwise be heard only after a long call of C."""


class Requests:
    """Tells new requests from echoes; for the handler of one or several signals."""

    def __init__(self) -> None:
        self._heard: dict[int, float] = {}

    def is_new(self, number: int) -> bool:
        """Whether signal `number`, which has just come, is no echo of an earlier one."""
        before, now = self._heard.get(number), time.monotonic()
        self._heard[number] = now
        if before is not None and now - before < ECHO:
            return False
        time.sleep(min(_LINGER, ECHO))  # an echo is handled meanwhile, by this function
        return True
