"""Readers: one source to its documents, as a stream. Every optional package of `data` is imported here."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longread.config import UserError
from longread.data.locate import HUB_PREFIX, Source, TextFile, Unreadable
from longread.data.text import NotText, TextFormat
from longread.extras import install_command

ARRAY_BLOCK = 1 << 20
HELD_CHARACTERS = 1 << 20
"""A file that was found in a directory is read to its end before it counts as text; twice, if it is longer."""


@dataclass(frozen=True)
class SourceDocument:
    """One text: `source` and, in a source of many, the `row` counted from 0. `pieces` can be iterated once."""

    source: str
    row: int | None
    pieces: Iterable[str]
    named: bool = False


class TokenRun(NamedTuple):
    """A part of a token array; `first` where a new document starts with it."""

    first: bool
    row: int
    tokens: np.ndarray


def read_documents(
    source: Source, text_field: str, skipped: Counter[str], text_format: TextFormat
) -> Iterator[SourceDocument]:
    """The documents of one source that holds text, in pieces of any length.

    Files that hold no text are counted in `skipped`, unless they were named: then, as for rows that cannot be read,
    `UserError`. Rows without text are counted.
    """
    if source.kind == "text":
        yield from _read_text_file(source, skipped, text_format)
        return
    rows = {
        "jsonl": lambda: _jsonl_rows(source.name, text_field, text_format),
        "parquet": lambda: _parquet_rows(source.name, text_field),
        "hub": lambda: _hub_rows(source.name, text_field),
    }[source.kind]
    empty = True
    for row, text in enumerate(rows()):
        empty = False
        if text is None or text == "":
            skipped["empty"] += 1
            continue
        if not isinstance(text, str):
            raise UserError(f"{text_field} of {source.name}:{row} is {type(text).__name__}; it must be a text")
        # JSON may spell half a surrogate pair, which no UTF-8 can hold.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield SourceDocument(source.name, row, [text_format.normalized(text)])
    if empty:
        if source.named:
            raise UserError(f"{source.name} has no rows; give a source with text")
        skipped["empty"] += 1


def _read_text_file(source: Source, skipped: Counter[str], text_format: TextFormat) -> Iterator[SourceDocument]:
    file = TextFile(source.name, text_format, named=source.named)
    start: list[str] = []
    held = 0
    try:
        pieces = iter(file)
        for piece in pieces:
            start.append(piece)
            held += len(piece)
            if held > HELD_CHARACTERS:
                break
        if not start:
            raise Unreadable(source.name, NotText("is empty", "give a file with text", kind="empty"))
        if not source.named and held > HELD_CHARACTERS:  # read it all before promising that it is text
            for _ in pieces:
                pass
            start, pieces = [], iter(file)
    except Unreadable as error:
        if source.named:
            raise
        skipped[error.kind] += 1
        return
    yield SourceDocument(source.name, None, itertools.chain(start, pieces), source.named)


def _lines(path: str, text_format: TextFormat) -> Iterator[str]:
    parts: list[str] = []
    for piece in TextFile(path, text_format):
        end, *others = piece.split("\n")
        parts.append(end)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _jsonl_rows(path: str, field: str, text_format: TextFormat) -> Iterator[Any]:
    for number, line in enumerate(_lines(path, text_format), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {path} is not JSON ({error}); give one object a line") from None
        if not isinstance(row, dict) or field not in row:
            has = ", ".join(row) if isinstance(row, dict) else "no fields"
            raise UserError(f"line {number} of {path} has no field {field!r} but {has}; name the one that holds text")
        yield row[field]


def _parquet_rows(path: str, field: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"Parquet needs pyarrow; run {install_command('parquet')}") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise UserError(
                    f"{path} has no column {field!r} but {', '.join(columns)}; name the one that holds text"
                )
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                yield from batch.column(0).to_pylist()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a valid Parquet file ({error}); make it again") from None


def _hub_rows(name: str, field: str) -> Iterator[Any]:
    """`hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIGURATION:SPLIT`, streamed; the split is `train` unless given."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"Hugging Face datasets need datasets; run {install_command('hub')}") from None
    path, *rest = name.removeprefix(HUB_PREFIX).split(":")
    if not path or len(rest) > 2:
        raise UserError(f"{name} is not a dataset name; write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT")
    configuration = rest[0] if len(rest) == 2 else None
    try:
        for row in datasets.load_dataset(path, configuration, split=rest[-1] if rest else "train", streaming=True):
            if field not in row:
                raise UserError(f"{name} has no field {field!r} but {', '.join(row)}; name the one that holds text")
            yield row[field]
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split
        raise UserError(f"cannot read {name}: {' '.join(str(error).split())}") from None


class TokenArray:
    """A one-dimensional Zarr array of token ids, as the official code reads them; one chunk is in memory at a time.

    `first`: only that many tokens of it are read, and only their chunks have to be there.
    """

    def __init__(self, path: str, first: int | None = None) -> None:
        try:
            import zarr
        except ImportError:
            raise UserError(f"token arrays need zarr; run {install_command('zarr')}") from None
        self.path = path
        try:
            self._array = zarr.open_array(path, mode="r")
        except Exception as error:  # the library raises many kinds on damaged metadata
            raise UserError(f"cannot read the token array {path}: {' '.join(str(error).split())}") from None
        if self._array.ndim != 1 or self._array.dtype.kind not in "iu":
            shape = f"{self._array.ndim} dimensions of {self._array.dtype}"
            raise UserError(f"{path} has {shape}; a token array has one dimension of whole numbers")
        if self._array.shape[0] < 2:
            raise UserError(f"{path} has {self._array.shape[0]} tokens; give at least 2")
        self.num_tokens = min(self._array.shape[0], first or self._array.shape[0])
        self._chunk_tokens: int = (self._array.shards or self._array.chunks)[0]
        self._chunk: tuple[int, np.ndarray] | None = None

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]. Going forwards reads every chunk once, however large it is."""
        parts = []
        while start < stop:
            index = start // self._chunk_tokens
            begin = index * self._chunk_tokens
            parts.append(self._read(index)[start - begin : stop - begin])
            start += len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def _read(self, index: int) -> np.ndarray:
        if self._chunk is None or self._chunk[0] != index:
            self._chunk = None
            start = index * self._chunk_tokens
            key = self._array.metadata.encode_chunk_key((index,))
            if not (file := Path(self.path, key)).is_file():  # the library would invent its tokens
                few = f", or read only the first {start} with array_tokens" if start > 1 else ""
                raise UserError(f"{self.path} lacks its chunk {key}, from token {start} on; copy it again{few}")
            try:
                self._check_blosc(file)
                tokens = np.asarray(self._array[start : start + self._chunk_tokens])
            except Exception as error:  # a damaged chunk raises what its codec raises
                reason = " ".join(str(error).split())
                raise UserError(
                    f"cannot read the token array {self.path} at token {start}: {reason}; copy {key} again"
                ) from None
            self._chunk = index, tokens
        return self._chunk[1]

    def _check_blosc(self, file: Path) -> None:
        """Raises `ValueError` for a chunk cut short: the decoder of blosc would read on behind it, whatever is there.

        Bytes 12 to 15 of what blosc has packed are its length.
        """
        if [type(codec).__name__ for codec in self._array.compressors][-1:] in (["Blosc"], ["BloscCodec"]):
            with file.open("rb") as opened:
                packed = max(16, int.from_bytes(opened.read(16)[12:], "little"))
            if packed != (size := file.stat().st_size):
                raise ValueError(f"it has {size} bytes instead of {packed}")

    def blocks(self) -> Iterator[np.ndarray]:
        """int64 [up to ARRAY_BLOCK], every token once."""
        for start in range(0, self.num_tokens, ARRAY_BLOCK):
            yield self.tokens(start, min(start + ARRAY_BLOCK, self.num_tokens))

    def maximum(self) -> int:
        return max(int(block.max()) for block in self.blocks())

    def runs(self, bos_id: int | None) -> Iterator[TokenRun]:
        """The array cut before every BOS and wherever a block ends."""
        row = -1
        for block in self.blocks():
            starts = [] if bos_id is None else np.flatnonzero(block == bos_id).tolist()
            for start, end in itertools.pairwise(sorted({0, *starts, len(block)})):
                first = row < 0 or bool(bos_id is not None and block[start] == bos_id)
                row += first
                yield TokenRun(first, row, block[start:end])

    def stretches(self, length: int) -> Iterator[TokenRun]:
        """The array cut every `length` tokens, whatever they are, and each stretch with the token after it.

        These are the samples of the official loader: as many predictions each, every token but the first one a target
        once. What is left over at the end is dropped. Raises `UserError` if that is all.
        """
        count = (self.num_tokens - 1) // length
        if not count:
            raise UserError(
                f"{self.path} has {self.num_tokens:,} tokens and a stretch of {length:,} needs {length + 1:,}; cut it "
                "shorter"
            )
        for row in range(count):
            begin, end = row * length, (row + 1) * length + 1
            for start in range(begin, end, ARRAY_BLOCK):
                yield TokenRun(start == begin, row, self.tokens(start, min(start + ARRAY_BLOCK, end)))
