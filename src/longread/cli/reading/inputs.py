"""The texts that a reading is about: files, one after another, or a pipe."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence

from longread.config import UserError
from longread.data import TextFile, TextFormat, open_texts


class Inputs:
    """Texts, each in strings; they can be gone through again unless one is a pipe.

    Args:
        names: of files, directories and globs; "-" is stdin.

    Raises:
        UserError: something named does not exist.
    """

    def __init__(self, names: Sequence[str], text_format: TextFormat | None = None) -> None:
        self._files = open_texts(names, text_format)
        self._read = 0  # bytes of the files before the newest
        self._newest: TextFile | None = None
        self.piped = any(file.name == "-" for file in self._files)
        """Whether a part comes from stdin, which comes only once."""

    @property
    def size(self) -> int | None:
        """Bytes of all files, as they lie on the disk; None where that is not known."""
        sizes = [file.size for file in self._files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def num_bytes_read(self) -> int:
        """Of these."""
        return self._read + (self._newest.num_bytes_read if self._newest else 0)

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Raises `UserError`, as do the texts, where one cannot be read, is no text, or is empty."""
        self._read, self._newest = 0, None
        for file in self._files:
            self._read, self._newest = self.num_bytes_read, file
            yield _named(file) if file.named else _found(file)


def _named(file: TextFile) -> Iterator[str]:
    empty = True
    for string in file:
        empty = False
        yield string
    if empty:
        raise UserError(f"{file.shown_name} is empty; give a text of at least one character")


def _found(file: TextFile) -> Iterator[str]:
    """A file of a directory is left out where its beginning is no text."""
    strings = iter(file)
    try:
        beginning = list(itertools.islice(strings, 2))
    except UserError as error:
        warnings.warn(f"left out: {error}", stacklevel=1)
        return
    yield from beginning
    yield from strings
