"""A thread held where a test wants it, so that nothing depends on how fast the machine is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Held:
    """A function whose n-th call waits until it is let go; `entered` is set once it does."""

    def __init__(self, function: Callable[..., Any], call: int = 1) -> None:
        self._function, self._left = function, call
        self.entered, self._let = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self.entered.set()
            if not self._let.wait(120):
                raise TimeoutError("nobody let it go")
        return self._function(*args, **kwargs)

    def go(self) -> None:
        self._let.set()
