"""Bytes to text, in one way for whatever the library reads as a text: encodings, line ends, and what is no text."""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from longread.config import UserError
from longread.data.kinds import SHOWN_BYTES, kind_of

BLOCK_BYTES = 1 << 16
Errors = Literal["strict", "replace"]
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_MARK = "\ufeff"


class NotText(ValueError):
    """Bytes that are no text: the `reason` as a predicate, a `remedy`, and the `byte` where the text ends.

    `kind` is the word under which such a file is counted where it may be left out.
    """

    def __init__(self, reason: str, remedy: str, *, byte: int = 0, kind: str = "binary") -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy, self.byte, self.kind = reason, remedy, byte, kind


@dataclass(frozen=True)
class TextFormat:
    """How bytes are made into text.

    Raises:
        UserError: there is no such encoding.
    """

    encoding: str | None = None
    """Any that Python knows; None takes the one that a byte order mark names, else UTF-8."""
    errors: Errors = "strict"
    """The treatment of bytes that are no text: "strict" refuses them, "replace" makes U+FFFD of them."""
    keep_line_ends: bool = False
    """False makes one line feed of a carriage return, with or without a line feed behind it."""
    markup: bool = False
    """Whether HTML and RTF are read with their tags; else they are refused."""

    def __post_init__(self) -> None:
        if self.errors not in get_args(Errors):
            raise UserError(f"errors is {self.errors!r}; it must be strict or replace")
        if self.encoding is not None:
            try:
                known = codecs.lookup(self.encoding)
            except (LookupError, ValueError):
                known = None
            if known is None or not known._is_text_encoding:
                raise UserError(f"there is no encoding {self.encoding!r}; give utf-8, latin-1 or another")

    def as_json(self) -> dict[str, str]:
        """The record of it in a data set."""
        ends = "kept" if self.keep_line_ends else "lf"
        return {"encoding": self.encoding or "utf-8", "errors": self.errors, "line_ends": ends}

    def normalized(self, text: str) -> str:
        """A text that is no bytes any more, with its line ends as they are to be."""
        return text if self.keep_line_ends else text.replace("\r\n", "\n").replace("\r", "\n")


def decode_text(blocks: Iterable[bytes], text_format: TextFormat | None = None) -> Iterator[str]:
    """The text of `blocks`, in pieces that are not empty, as soon as each is there.

    A byte order mark at the very beginning says how the file is encoded and is dropped: it is no part of the text.
    Raises `NotText` at a file that is no text file, a NUL, and bytes that are not valid; what stands before them has
    been given then.
    """
    text_format = text_format or TextFormat()
    start, rest = _beginning(blocks)
    if (kind := kind_of(start, text_format.markup)) is not None:
        raise NotText(f"is {kind.name}", kind.remedy)
    lines = io.IncrementalNewlineDecoder(None, translate=not text_format.keep_line_ends)
    begun = False
    pieces = _strings(itertools.chain([start], rest), _encoding_of(start, text_format), text_format.errors)
    while True:
        try:
            piece, wrong = next(pieces, None), None
        except NotText as error:
            piece, wrong = None, error
        text = lines.decode(piece or "", final=piece is None)
        if text and not begun:
            begun, text = True, text.removeprefix(_MARK)
        if text:
            yield text
        if wrong is not None:
            raise wrong
        if piece is None:
            return


def _beginning(blocks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Enough bytes to tell what they are, and the others."""
    rest, start = iter(blocks), b""
    while len(start) < SHOWN_BYTES and (block := next(rest, None)) is not None:
        start += block
    return start, rest


def _encoding_of(start: bytes, text_format: TextFormat) -> str:
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    return text_format.encoding or marked


def _strings(blocks: Iterable[bytes], encoding: str, errors: Errors) -> Iterator[str]:
    """The decoded blocks. Raises `NotText` after what stands before a NUL or a byte that is not valid."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))  # they are full of NUL bytes
    before = 0  # bytes of the blocks before
    for block in itertools.chain(blocks, [b""]):
        state, final = decoder.getstate(), not block
        wrong = None
        nul = -1 if wide or errors == "replace" else block.find(b"\0")
        try:
            text = decoder.decode(block if nul < 0 else block[:nul], final or nul >= 0)
        except UnicodeDecodeError as error:
            place = error.start - len(error.object) + (len(block) if nul < 0 else nul)  # in the block; before it if < 0
            wrong = _invalid(before + place, encoding)
            decoder.setstate(state)
            text = decoder.decode(block[: max(0, place)])
        else:
            if nul >= 0:
                wrong = _zero(before + nul)
        if "\0" in text:
            if errors == "strict":
                text = text[: text.index("\0")]
                wrong = _zero(before + len(text.encode(encoding)))
            text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        if text:
            yield text
        if wrong is not None:
            raise wrong
        before += len(block)


def _invalid(byte: int, encoding: str) -> NotText:
    reason = f"is not valid {'UTF-8' if encoding == 'utf-8' else encoding} from byte {byte:,} on"
    return NotText(reason, "name its encoding (--encoding latin-1, say) or take --errors replace", byte=byte)


def _zero(byte: int) -> NotText:
    return NotText(f"is no text: its byte {byte:,} is zero", "give a text file", byte=byte)
