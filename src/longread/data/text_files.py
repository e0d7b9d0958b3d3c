"""Text files, and what is behind the names that a user gives."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from longread.config import UserError
from longread.data.locate import locate
from longread.data.packed import unpacked
from longread.data.text import NotText, TextFormat, decode_text

BLOCK_BYTES = 1 << 16
"""Read at a time."""


class Unreadable(UserError):
    """A file that holds no text, or only up to a `byte`. `kind` is as in `NotText`."""

    def __init__(self, name: str, error: NotText) -> None:
        super().__init__(f"{name} {error.reason}; {error.remedy}")
        self.byte, self.kind = error.byte, error.kind


class TextFile:
    """A text file, which can be iterated once or again, in pieces of text as `decode_text` gives them.

    A file that begins as gzip does is unpacked. Iterating raises `UserError` if it cannot be read or is no text, after
    what stands before that was given.

    Args:
        name: of the file; - is stdin, which can be iterated only once.
    """

    def __init__(self, name: str, text_format: TextFormat | None = None, *, named: bool = True) -> None:
        self.name, self.text_format, self.named = name, text_format or TextFormat(), named
        self.num_bytes_read = 0
        """Bytes of the file that have been read, packed if it is."""

    @property
    def size(self) -> int | None:
        """Bytes of the file; None if nobody knows."""
        try:
            status = os.fstat(sys.stdin.fileno()) if self.name == "-" else os.stat(self.name)
        except (OSError, ValueError, AttributeError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    @property
    def shown_name(self) -> str:
        """The name for people."""
        return "stdin" if self.name == "-" else self.name

    def __iter__(self) -> Iterator[str]:
        self.num_bytes_read = 0
        blocks = unpacked(self._blocks(), packed=self.name.endswith(".gz"))
        try:
            yield from decode_text(blocks, self.text_format)
        except NotText as error:
            raise Unreadable(self.shown_name, error) from None

    def _blocks(self) -> Iterator[bytes]:
        try:
            if self.name == "-":
                yield from self._counted(_stdin())
            else:
                with open(self.name, "rb", buffering=0) as file:
                    yield from self._counted(file)
        except OSError as error:
            reason = f"is unreadable: {error.strerror}"
            raise NotText(
                reason, "check its path and permissions", byte=self.num_bytes_read, kind="unreadable"
            ) from None

    def _counted(self, file: BinaryIO) -> Iterator[bytes]:
        read = file.read1 if hasattr(file, "read1") else file.read
        while block := read(BLOCK_BYTES):
            self.num_bytes_read += len(block)
            yield block


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("stdin is closed; give a file, or a text on stdin")
    return sys.stdin.buffer


def open_texts(
    names: Sequence[str], text_format: TextFormat | None = None, *, exclude: Sequence[str] = ()
) -> list[TextFile]:
    """The text files behind `names`, in order: files, those in directories (hidden ones left out), globs, and - once.

    `named` tells files that were named from those that were found. Raises `UserError` for what does not exist or cannot
    be a text file, before anything is read.
    """
    files: list[TextFile] = []
    for name in names:
        if name == "-":
            if any(file.name == "-" for file in files):
                raise UserError("- is given twice, and stdin can be read only once; give it once")
            files.append(TextFile(name, text_format))
            continue
        for source in locate([name], exclude=exclude):
            if source.kind in ("hub", "array"):
                raise UserError(f"{source.name} is no text file; give it to longread prepare")
            files.append(TextFile(source.name, text_format, named=source.named))
    return files
