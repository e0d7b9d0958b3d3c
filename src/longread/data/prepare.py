"""From sources and a tokenizer to token shards, as a stream."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from longread.config import UserError
from longread.data.locate import Source, locate
from longread.data.shards import VALIDATION, Documents, ShardWriter, TokenDataset, read_index
from longread.data.sources import SourceDocument, TokenArray, read_documents
from longread.data.staging import staged_directory
from longread.data.text import TextFormat

SHARD_TOKENS = 1 << 27
PIECE_CHARACTERS = 1 << 20
"""A document this long or shorter is encoded in one go; a longer one in pieces, so that memory stays bounded."""
BATCH_CHARACTERS = PIECE_CHARACTERS * max(1, min(32, (os.cpu_count() or 1) // 2))
"""Text that is encoded at a time, so that a tokenizer can use every core; memory is bounded by it."""


class CutText(Protocol):
    """A piece of a document, and what its tokenizer must know of what stands before it."""

    @property
    def text(self) -> str: ...


class TextEncoder(Protocol):
    """The part of a tokenizer that is needed here; `longread.tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def cut(self, pieces: Iterable[str], least: int) -> Iterator[CutText]: ...

    def encode_cut(self, pieces: Sequence[Any]) -> list[list[int]]: ...

    def save(self, directory: Path) -> None: ...


class PrepareProgress(NamedTuple):
    """How much has been written so far, and the source being read."""

    documents: int
    tokens: int
    bytes: int
    source: str


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: TextEncoder | None,
    *,
    documents: Documents = "reset",
    text_field: str = "text",
    validation_fraction: float = 0.0,
    shard_tokens: int = SHARD_TOKENS,
    exclude: Sequence[str] = (),
    vocab_size: int | None = None,
    bos_id: int | None = None,
    array_tokens: int | None = None,
    stretch: int | None = None,
    text_format: TextFormat | None = None,
    overwrite: bool = False,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> TokenDataset:
    """Writes the documents of `sources` to the directory `out`, in order, and opens it.

    `sources`: text files (a document each, without a byte order mark), directories, globs, `.jsonl` and
    `.parquet` (a document per row, in `text_field`), each also as `.gz` where it is text,
    `hf:NAME[:CONFIGURATION][:SPLIT]`, and Zarr token arrays (cut into documents at BOS). Every text starts with BOS if
    the tokenizer has one.

    `documents`: "reset", windows keep inside documents; "join", they run across them. It is recorded with the data.
    `validation_fraction`: about this share of the documents goes to `out/validation` instead (`.validation`), chosen
    by a hash of how each begins; the choice does not depend on order or names, and copies stay together.
    `exclude`: patterns of names or paths left out of directories and globs. `vocab_size`, `bos_id`: for token arrays
    without a tokenizer; by default the largest id plus one, and no BOS. `array_tokens`: read the first so many of each
    token array; chunks behind them need not be there. `stretch`: cut token arrays every so many tokens instead, as the
    official loader does, each stretch a document with the token after it. `text_format`: how bytes are made into text,
    recorded with the data; by default UTF-8, or what a byte order mark says, and carriage returns become line feeds;
    HTML is taken as it is. `overwrite`: replace a dataset at `out`.

    Files in directories and globs that are binary, empty, unreadable or shorter than 2 tokens, and rows without text,
    are counted in `.index["skipped"]`; a file that was named itself is an error. Raises `UserError`; then nothing is
    left behind and what was at `out` is untouched. After a kill at any moment the old dataset or the new one is found
    at `out`.
    """
    if documents not in get_args(Documents):
        raise UserError(f"documents is {documents!r}; it must be reset or join")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must lie in [0, 1)")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    if array_tokens is not None and array_tokens < 2:
        raise UserError(f"array_tokens is {array_tokens}; it must be at least 2")
    if stretch is not None and stretch < 1:
        raise UserError(f"stretch is {stretch}; it must be at least 1")
    text_format = text_format or TextFormat(markup=True)
    out = Path(out).expanduser()
    with staged_directory(out, may_replace=_is_dataset if overwrite else None) as staging:
        found = locate(sources, exclude=exclude, out=out)
        if tokenizer is None:
            vocab_size = _checked_vocabulary(found, vocab_size, bos_id, array_tokens)
        elif bos_id is not None:
            raise UserError(f"bos_id is {bos_id}, but the tokenizer has its own; it is for token arrays alone")
        else:
            vocab_size, bos_id = tokenizer.vocab_size, tokenizer.bos_id
        for option, value in (("array_tokens", array_tokens), ("stretch", stretch)):
            if value is not None and not any(source.kind == "array" for source in found):
                raise UserError(f"{option} is {value}, but no source is a token array; leave it out")
        train = ShardWriter(staging, vocab_size, shard_tokens)
        validation = ShardWriter(staging / VALIDATION, vocab_size, shard_tokens) if validation_fraction else None
        with contextlib.closing(train), contextlib.closing(validation or train):
            stream = _Preparation(
                tokenizer,
                bos_id,
                train,
                validation,
                validation_fraction,
                text_field,
                text_format,
                progress,
                array_tokens,
                stretch,
            )
            for source in found:
                stream.read(source)
            stream.finish(documents)
    return TokenDataset.open(out)


class _TextPiece(NamedTuple):
    """A part of a document's text: the `number`-th, and whether it is the only one. `begin` is how the text begins."""

    document: SourceDocument
    number: int
    only: bool
    begin: str
    cut: CutText


@dataclass
class _Preparation:
    """The running state: which split the current document goes to, and the counts."""

    tokenizer: TextEncoder | None
    bos_id: int | None
    train: ShardWriter
    validation: ShardWriter | None
    validation_fraction: float
    text_field: str
    text_format: TextFormat
    progress: Callable[[PrepareProgress], None] | None
    array_tokens: int | None
    stretch: int | None
    skipped: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self._waiting: list[_TextPiece] = []
        self._characters = 0
        self.writer = self.train
        self.writers = [self.train] if self.validation is None else [self.train, self.validation]

    def read(self, source: Source) -> None:
        if source.kind == "array":
            self._encode()
            array = TokenArray(source.name, self.array_tokens)
            for run in array.stretches(self.stretch) if self.stretch else array.runs(self.bos_id):
                if run.first:
                    self._begin(source.name, run.row, run.tokens.tobytes())
                self._add(source.name, run.tokens, None)
        elif self.tokenizer is not None:
            for document in read_documents(source, self.text_field, self.skipped, self.text_format):
                for piece in _cut(document, self.tokenizer):
                    self._waiting.append(piece)
                    self._characters += len(piece.cut.text)
                    if self._characters >= BATCH_CHARACTERS:
                        self._encode()

    def finish(self, documents: Documents) -> None:
        self._encode()
        if not any(writer.num_documents for writer in self.writers):
            skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            raise UserError(f"there is no text in the sources ({skipped or 'nothing found'}); give UTF-8 text")
        for name, writer in zip(("training", VALIDATION), self.writers, strict=False):
            if not writer.num_documents:
                raise UserError(
                    f"validation_fraction {self.validation_fraction} left no document for {name}; "
                    "give more documents or another fraction"
                )
            facts = {
                "bos_id": self.bos_id,
                "tokenizer": self.tokenizer and self.tokenizer.fingerprint,
                "documents": documents,
                **({} if self.tokenizer is None else {"text": self.text_format.as_json()}),
                "skipped": dict(sorted(self.skipped.items())),
            }
            if self.tokenizer is not None:
                self.tokenizer.save(writer.directory)
            writer.finish(facts)

    def _encode(self) -> None:
        """Writes what waits."""
        pieces, self._waiting, self._characters = self._waiting, [], 0
        if self.tokenizer is None or not pieces:
            return
        for piece, ids in zip(pieces, self.tokenizer.encode_cut([piece.cut for piece in pieces]), strict=True):
            self._add_text(piece, ids)

    def _add_text(self, piece: _TextPiece, ids: list[int]) -> None:
        document = piece.document
        if piece.only and len(ids) < 2:
            if document.named:
                raise UserError(f"{document.source} has {len(ids)} tokens of text; give at least 2")
            self.skipped["too short"] += 1
            return
        if piece.number == 0:
            self._begin(document.source, document.row, piece.begin.encode())
            if self.bos_id is not None:
                ids = [self.bos_id, *ids]
        self._add(document.source, np.array(ids, dtype=np.int64), len(piece.cut.text.encode()))

    def _begin(self, source: str, row: int | None, start: bytes) -> None:
        self.writer = self.train
        if self.validation is not None:
            draw = int.from_bytes(hashlib.blake2b(start, digest_size=8).digest(), "big") / 2**64
            if draw < self.validation_fraction:
                self.writer = self.validation
        self.writer.begin_document(source, row)

    def _add(self, source: str, tokens: np.ndarray, num_bytes: int | None) -> None:
        self.writer.add(tokens, num_bytes)
        self.num_bytes += num_bytes or 0
        if self.progress is not None:
            num_documents = sum(writer.num_documents for writer in self.writers)
            num_tokens = sum(writer.num_tokens for writer in self.writers)
            self.progress(PrepareProgress(num_documents, num_tokens, self.num_bytes, source))


def _cut(document: SourceDocument, tokenizer: TextEncoder) -> Iterator[_TextPiece]:
    """A document in pieces, cut where no token is."""
    start: list[str] = []
    held, rest = 0, iter(document.pieces)
    while held <= PIECE_CHARACTERS and (piece := next(rest, None)) is not None:
        start.append(piece)
        held += len(piece)
    begin = "".join(start)[:PIECE_CHARACTERS]
    cuts = iter(tokenizer.cut(itertools.chain(start, rest), PIECE_CHARACTERS))
    first, second = next(cuts, None), next(cuts, None)
    for number, cut in enumerate(itertools.chain([first, second], cuts)):
        if cut is not None:
            yield _TextPiece(document, number, second is None, "" if number else begin, cut)


def _checked_vocabulary(
    sources: Sequence[Source], vocab_size: int | None, bos_id: int | None, array_tokens: int | None
) -> int:
    """The vocabulary of sources that are all token arrays."""
    for source in sources:
        if source.kind != "array":
            raise UserError(f"{source.name} is text and needs a tokenizer, for example bytes")
    if vocab_size is None:
        vocab_size = max(1, *(1 + TokenArray(source.name, array_tokens).maximum() for source in sources))
    if not 1 <= vocab_size <= 1 << 32:
        raise UserError(f"vocab_size is {vocab_size}; it must lie between 1 and 2^32")
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise UserError(f"bos_id {bos_id} is outside the vocabulary of {vocab_size}; give matching values")
    return vocab_size


def _is_dataset(path: Path) -> bool:
    try:
        read_index(path)
    except UserError:
        return False
    return True
