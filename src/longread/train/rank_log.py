"""A log for each rank of several: what it has to say, and how long its steps took.

    RUN/logs/rank-3.log

One slow rank slows all; its own seconds show which it is.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longread.files import writing
from longread.parallel import World

LOGS = "logs"
steps = logging.getLogger("longread.steps")
"""The name of the log of each rank's steps."""
steps.propagate = False


@contextlib.contextmanager
def rank_log(world: World, out: Path) -> Iterator[None]:
    """While it is entered, warnings and the library's messages go into this rank's log too; alone there is none.

    The warnings of rank 0 are shown as well: others have the same to say.
    """
    if world.size == 1:
        yield
        return
    path = out / LOGS / f"rank-{world.rank}.log"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    library, shown = logging.getLogger("longread"), warnings.showwarning

    def show(message: Warning | str, *rest: Any, **options: Any) -> None:
        steps.warning("%s", message)
        if world.is_first:
            shown(message, *rest, **options)

    steps.setLevel(logging.INFO)
    for logger in (library, steps):
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        for logger in (library, steps):
            logger.removeHandler(handler)
        handler.close()
