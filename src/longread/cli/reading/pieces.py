"""The texts of a reading, and their tokens in pieces that end at positions which depend on nothing but model and texts.

They are cut where a session cuts a text (`longread.session.text`), so that a reading that stopped and went on is the
one that was never disturbed, bit for bit; and a session is kept only there.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from longread.config import ModelConfig, UserError
from longread.data import TextFile, TextFormat, open_texts
from longread.session import TextPrefix, next_cut
from longread.tokenizer import StreamEncoder, Tokenizer


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


class TokenPiece(NamedTuple):
    """Tokens that are read at once."""

    ids: list[int]
    byte_lengths: list[int]
    """UTF-8 bytes that each token covers; BOS covers none."""
    prefix: TextPrefix
    """Of the texts, this piece included."""


class OtherText(UserError):
    """The texts do not begin with what a session has read."""


class _Waiting(NamedTuple):
    """Tokens that have not been read yet, and the UTF-8 bytes of the text from there on."""

    ids: list[int]
    byte_lengths: list[int]
    data: bytes


class Pieces:
    """The pieces of texts that are read one after another.

    Args:
        texts: each in strings, and encoded by itself.
        position: of the session; one that has read nothing begins as the tokenizer says, with BOS.
        begun: what the session has read of these texts already. It is passed over, and compared.
    """

    def __init__(
        self,
        texts: Iterable[Iterable[str]],
        tokenizer: Tokenizer,
        config: ModelConfig,
        device: str,
        *,
        position: int,
        begun: TextPrefix | None = None,
    ) -> None:
        self._texts, self._tokenizer, self._config, self._device = texts, tokenizer, config, device
        self._beginning = [] if position else tokenizer.beginning
        self._begun = begun
        self._bytes_over = begun.segment_bytes if begun else 0  # to be passed over without looking at their tokens
        self._position = begun.segment_position if begun else position + len(self._beginning)  # of the next token
        self._hash, self._bytes = hashlib.sha256(), 0
        self._segment = self._position, 0
        self._waiting = _Waiting([], [], b"")

    def __iter__(self) -> Iterator[TokenPiece]:
        """Raises `OtherText` if the texts do not begin with what has been read."""
        for text in self._texts:
            encoder = StreamEncoder(self._tokenizer)
            self._segment = self._position, self._bytes
            for string in text:
                kept = self._pass_over(string)
                self._grow(kept, *encoder.push(kept))
                yield from self._whole()
            self._grow("", *encoder.close())
            yield from self._whole()
            if piece := self.rest():
                yield piece
        if self._begun is not None:
            raise OtherText(f"the text ends after {self._bytes:,} bytes, and {self._begun.num_bytes:,} of it were read")

    @property
    def share_taken(self) -> float:
        """Of all bytes that have come, those that the pieces hold."""
        return self._bytes / max(1, self._bytes + len(self._waiting.data))

    def rest(self) -> TokenPiece | None:
        """Tokens that are certain and not enough for a piece: to be read where nothing more comes."""
        if self._begun is not None or not self._waiting.ids:
            return None
        return self._take(len(self._waiting.ids))

    def _pass_over(self, string: str) -> str:
        if not self._bytes_over:
            return string
        data = string.encode()
        over = data[: self._bytes_over]
        self._hash.update(over)
        self._bytes += len(over)
        self._bytes_over -= len(over)
        self._segment = self._position, self._bytes
        try:
            return data[len(over) :].decode()
        except UnicodeDecodeError:
            raise OtherText("the text does not begin with what was read") from None

    def _grow(self, string: str, ids: list[int], byte_lengths: list[int]) -> None:
        known = self._waiting
        self._waiting = _Waiting(known.ids + ids, known.byte_lengths + byte_lengths, known.data + string.encode())

    def _whole(self) -> Iterator[TokenPiece]:
        """All pieces that end at their cut."""
        if self._begun is not None and not self._bytes_over:
            self._take(min(self._begun.position - self._position, len(self._waiting.ids)))
            if self._position == self._begun.position:
                self._compare(self._begun)
        while self._begun is None:
            count = next_cut(self._position - len(self._beginning), self._config, self._device) - self._position
            if len(self._waiting.ids) < count:
                break
            yield self._take(count)

    def _compare(self, begun: TextPrefix) -> None:
        if (self._bytes, self._hash.hexdigest()) != (begun.num_bytes, begun.sha256):
            raise OtherText(f"its first {begun.num_bytes:,} bytes are not those that were read")
        self._begun = None

    def _take(self, count: int) -> TokenPiece:
        ids, byte_lengths, data = self._waiting
        size = sum(byte_lengths[:count])
        self._hash.update(data[:size])
        self._bytes += size
        self._position += count
        self._waiting = _Waiting(ids[count:], byte_lengths[count:], data[size:])
        prefix = TextPrefix(self._position, self._bytes, self._hash.hexdigest(), False, *self._segment)
        beginning, self._beginning = self._beginning, []
        return TokenPiece(beginning + ids[:count], [0] * len(beginning) + byte_lengths[:count], prefix)
