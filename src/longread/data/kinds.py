"""Files that are no plain text, told by how they begin."""

from __future__ import annotations

import re
from typing import NamedTuple

from longread.config import UserError

SHOWN_BYTES = 64
"""So many first bytes tell the kind."""


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
_ADDRESS = re.compile(r"(https?|ftp)://", re.IGNORECASE)


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


def refuse_address(name: str) -> None:
    """Raises `UserError` if a file name is a URL."""
    if _ADDRESS.match(name):
        raise UserError(f"{name} is an address, not a file; download it first, for example with curl -LO")
