"""Bytes to text, in one way for whatever the library reads as a text: gzip, encodings, line ends, and what is no text,
told by how it begins."""

from __future__ import annotations

import codecs
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from longread.config import UserError

Errors = Literal["strict", "replace"]
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_MARK = "\ufeff"
SHOWN_BYTES = 64
"""So many first bytes tell the kind."""
_GZIP, _GZIP_BITS = b"\x1f\x8b", 31
_MOST_UNPACKED = 1 << 20  # bytes at a time


class FileKind(NamedTuple):
    """A kind of file, and how a text is made of it."""

    name: str
    remedy: str


_UNPACK = "unpack it first"
_NO_TEXT = "give a text file"
_EXPORT = "save it as plain text first"
_KINDS = {
    b"%PDF-": FileKind("a PDF file", "take the text out first, for example with pdftotext"),
    b"PK\x03\x04": FileKind("a ZIP archive (or an office document, which is one)", "take the text out first"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": FileKind("an office document", _EXPORT),
    b"BZh": FileKind("compressed by bzip2", "give what bunzip2 makes of it"),
    b"\xfd7zXZ\0": FileKind("compressed by xz", "give what unxz makes of it"),
    b"\x28\xb5\x2f\xfd": FileKind("compressed by zstd", "give what unzstd makes of it"),
    b"7z\xbc\xaf\x27\x1c": FileKind("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": FileKind("a RAR archive", _UNPACK),
    b"PAR1": FileKind("a Parquet file", "give it to longread prepare under a name that ends in .parquet"),
    b"SQLite format 3\0": FileKind("an SQLite database", "export the texts first"),
    b"\x89PNG\r\n\x1a\n": FileKind("a PNG picture", _NO_TEXT),
    b"\xff\xd8\xff": FileKind("a JPEG picture", _NO_TEXT),
    b"GIF8": FileKind("a GIF picture", _NO_TEXT),
    b"\x7fELF": FileKind("a program", _NO_TEXT),
    b"ID3": FileKind("an MP3 recording", _NO_TEXT),
    b"OggS": FileKind("an Ogg recording", _NO_TEXT),
}
_IN_ZIP = ((b"word/", "a Word document"), (b"epub+zip", "an EPUB book"), (b"opendocument.text", "an OpenDocument text"))
_RTF = FileKind("an RTF document", _EXPORT)
_HTML = FileKind(
    "an HTML page, and would be read with its tags", "take the text out first (lynx -dump) or give --markup"
)
_IS_HTML = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)[\s>]", re.IGNORECASE | re.DOTALL)


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


def kind_of(start: bytes, markup: bool) -> FileKind | None:
    """The kind of a file that begins with `start`; None if it may be a text. `markup`: HTML and RTF are texts too."""
    for magic, kind in _KINDS.items():
        if start.startswith(magic):
            name = next((name for sign, name in _IN_ZIP if kind.name.startswith("a ZIP") and sign in start), kind.name)
            return kind._replace(name=name)
    if markup:
        return None
    start = start.removeprefix(b"\xef\xbb\xbf")
    if start.startswith(b"{\\rtf"):
        return _RTF
    return _HTML if _IS_HTML.match(start) else None


def unpacked(blocks: Iterable[bytes], *, packed: bool = False) -> Iterator[bytes]:
    """The blocks, without the gzip around them if they begin as gzip does; `packed`: they must.

    Raises `NotText` after what could be unpacked.
    """
    rest, start = iter(blocks), b""
    while len(start) < len(_GZIP) and (block := next(rest, None)) is not None:
        start += block
    if not start.startswith(_GZIP):
        if packed and start:
            raise _damaged()
        yield from itertools.chain([start] if start else [], rest)
        return
    unpacker, size = zlib.decompressobj(_GZIP_BITS), 0
    for block in itertools.chain([start], rest):
        while block:
            if unpacker.eof:  # a file may hold several, with zeros behind them
                if not (block := block.lstrip(b"\0")):
                    break
                unpacker = zlib.decompressobj(_GZIP_BITS)
            try:
                data = unpacker.decompress(block, _MOST_UNPACKED)
            except zlib.error:
                raise _damaged(size) from None
            size += len(data)
            block = unpacker.unconsumed_tail or unpacker.unused_data
            if data:
                yield data
    if data := unpacker.flush():
        yield data
    if not unpacker.eof:
        raise _damaged(size + len(data))


def _damaged(byte: int = 0) -> NotText:
    return NotText("is damaged: it is not whole gzip data", "pack it again", byte=byte, kind="damaged")
