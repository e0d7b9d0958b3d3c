"""The session file of a reading: where it begins or goes on, room for it, and its turn by the clock."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from longread.cli.reading.pieces import Inputs
from longread.config import UserError
from longread.files import remove_temporaries
from longread.loading import OpenModel
from longread.model import Transformer
from longread.session import Session, TextPrefix

EVERY = 30.0
"""Seconds between two saves, if these cost little."""
MOST_COST = 0.02
"""Share of the time that saving may take."""
_OVERHEAD = 2**20
"""Bytes of a session file beside its state: the header, figures, and the newest tokens."""


def check_room(path: str, model: Transformer) -> None:
    """Raises `UserError` if the disk has no room for a session beside the one that it replaces."""
    from longread.engine import largest_session

    place = Path(os.path.realpath(path)).parent
    while not place.exists():
        place = place.parent
    need, free = largest_session(model) + _OVERHEAD, shutil.disk_usage(place).free
    if need > free:
        raise UserError(
            f"--save {path} needs {need / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} left; "
            "free some space or choose another place"
        )


class Autosave:
    """Keeps a session in a file, now and then and at the end.

    Args:
        path: None keeps nothing.
        saved: what the file holds already.
        every: seconds between two saves; None: `EVERY`, or more where they cost more than `MOST_COST` of the time.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        path: str | None,
        *,
        saved: TextPrefix | None = None,
        every: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.path, self._every, self._clock = path, every, clock
        self.saved = saved
        """The text that the file's session has read."""
        self.refused: UserError | None = None
        """Why the newest save could not be written; what was saved before it is still there."""
        self._due = clock()

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and self._clock() >= self._due

    def save(self, session: Session) -> None:
        """Saves what has been read of a text, if the file does not hold it yet; says in `refused` if that failed."""
        if self.path is None or session.text is None or session.text == self.saved:
            return
        began = self._clock()
        try:
            session.save(self.path)
            self.saved, self.refused = session.text, None
        except UserError as error:
            self.refused = error
        now = self._clock()
        self._due = now + (max(EVERY, (now - began) / MOST_COST) if self._every is None else self._every)

    def __str__(self) -> str:
        """How much is safe, for people."""
        if self.saved is None:
            return "nothing is saved"
        return f"{self.path} holds the text up to byte {self.saved.num_bytes:,}"


class Beginning(NamedTuple):
    """The session that reads, and what it has read of the texts already."""

    session: Session
    begun: TextPrefix | None = None
    file: str | None = None
    """Where the session was kept."""


def session_file(session: str | None, save: str | None, *, resume: bool) -> str | None:
    """The file of the session that a command goes on with, by its options; None: it begins one."""
    return save if resume and save and os.path.exists(save) else session


def begin(opened: OpenModel, inputs: Inputs, *, session: str | None, save: str | None, resume: bool) -> Beginning:
    """The session of a command that reads.

    With `resume` that is the one at `save`, if it is there, else the one at `session`, and it goes on in its text.
    Without, one that was stopped in the middle of just these files goes on there, and any other reads them after all
    that it has read.

    Raises:
        UserError: a session cannot be opened, or does not say how far it is.
    """
    if resume and save:
        remove_temporaries(Path(save).parent, of=Path(save).name)
    file = session_file(session, save, resume=resume)
    if file is None:
        return Beginning(opened.session())
    restored = opened.restore(file)
    text = restored.text
    if resume and (save is None or file == save):
        if text is None:
            raise UserError(f"{file} does not say how far it is in a text; give it as --session, without --resume")
        return Beginning(restored, text, file)
    if text is None or text.whole or inputs.piped or not _begin_with(inputs, text):
        text = None
    return Beginning(restored, text, file)


def _begin_with(inputs: Inputs, prefix: TextPrefix) -> bool:
    """Whether the texts, one after another, begin with these bytes."""
    sha, left = hashlib.sha256(), prefix.num_bytes
    for text in inputs:
        for string in text:
            data = string.encode()[:left]
            sha.update(data)
            left -= len(data)
            if not left:
                return sha.hexdigest() == prefix.sha256
    return False
