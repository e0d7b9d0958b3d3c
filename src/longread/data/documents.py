"""The texts of sources, whole for reading or in pieces for learning a tokenizer from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from longread.config import UserError
from longread.data.locate import locate
from longread.data.sources import SourceDocument, read_documents
from longread.data.text import TextFormat

PIECE_CHARACTERS = 1 << 20
_WORD_END = re.compile(r".*\S(?=\s)", re.DOTALL)


def read_texts(
    sources: Sequence[str | Path],
    *,
    text_field: str = "text",
    exclude: Sequence[str] = (),
    text_format: TextFormat | None = None,
    longest: int | None = None,
) -> Iterator[str]:
    """The texts of `sources` as `prepare` reads them, each whole, or its first `longest` characters.

    Raises `UserError`.
    """
    for document in _documents(sources, text_field, exclude, text_format):
        text, room = [], longest
        for piece in document.pieces:
            text.append(piece[:room])
            room = None if room is None else room - len(text[-1])
            if room == 0:
                break
        yield "".join(text)


def read_pieces(
    sources: Sequence[str | Path],
    *,
    text_field: str = "text",
    exclude: Sequence[str] = (),
    text_format: TextFormat | None = None,
) -> Iterator[str]:
    """The same texts one after another in short pieces, to train a tokenizer on.

    A piece ends before white space that follows something else, where words end for every tokenizer trained here, or
    has no such place in a million characters. Raises `UserError`.
    """
    for document in _documents(sources, text_field, exclude, text_format):
        waiting = ""
        for piece in document.pieces:
            waiting += piece
            if found := _WORD_END.match(waiting):
                yield waiting[: found.end()]
                waiting = waiting[found.end() :]
            elif len(waiting) > PIECE_CHARACTERS:
                yield waiting
                waiting = ""
        if waiting:
            yield waiting


def _documents(
    sources: Sequence[str | Path], text_field: str, exclude: Sequence[str], text_format: TextFormat | None
) -> Iterator[SourceDocument]:
    for source in locate(sources, exclude=exclude):
        if source.kind == "array":
            raise UserError(f"{source.name} holds token ids, not text; give texts")
        yield from read_documents(source, text_field, Counter(), text_format or TextFormat())
