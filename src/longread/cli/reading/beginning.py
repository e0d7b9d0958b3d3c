"""Where a reading begins: at the beginning of its texts, after other texts, or where an earlier command stopped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from longread.cli.reading.inputs import Inputs
from longread.config import UserError
from longread.files import remove_temporaries
from longread.loading import OpenModel
from longread.session import Session, TextPrefix


class Beginning(NamedTuple):
    """The session that reads, and what it has read of the texts already."""

    session: Session
    begun: TextPrefix | None = None
    file: str | None = None
    """Where the session was kept."""


def begin(opened: OpenModel, inputs: Inputs, *, session: str | None, save: str | None, resume: bool) -> Beginning:
    """The session of a command that reads.

    With `resume` that is the one at `save`, if it is there, else the one at `session`, and it goes on in its text.
    Without, one that was stopped in the middle of just these files goes on there, and any other reads them after all
    that it has read.

    Raises:
        UserError: a session cannot be opened or does not say how far it is, or an unfinished one would be replaced.
    """
    if resume and save:
        remove_temporaries(Path(save).parent, of=Path(save).name)
    file = save if resume and save and os.path.exists(save) else session
    if file is None:
        if save and not resume:
            _refuse_to_replace(save, opened)
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


def _refuse_to_replace(path: str, opened: OpenModel) -> None:
    """Raises `UserError` if a reading that was not finished is kept at `path`."""
    try:
        text = opened.restore(path).text
    except UserError:
        return  # there is none, or it cannot be gone on with: of another model, or damaged
    if text is not None and not text.whole:
        raise UserError(
            f"{path} holds a reading that stopped at byte {text.num_bytes:,}; add --resume to go on with it, "
            "or remove it to begin anew"
        )
