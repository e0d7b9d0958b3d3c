"""The token format: memory-mapped shards and a JSON index.

    OUT/index.json          what `TokenDataset.open` checks; fields below
    OUT/tokens-00000.bin    little-endian uint16 (vocabularies up to 65536) or uint32, documents back to back
    OUT/tokenizer.json      the tokenizer, where one was used
    OUT/validation/         documents held out, in the same format

Index: `format`, `format_version`, `dtype`, `vocab_size`, `bos_id`, `tokenizer` (fingerprint), `documents` ("reset":
windows keep inside documents; "join": they run across), `num_tokens`, `shards` [{`file`, `tokens`, `sha256`}],
`sources`, `skipped` {reason: count} and `document_table`, a column per fact with an entry per document: `offset` of its
first token, `bytes` of UTF-8 text (-1: unknown), `source` as an index into `sources`, `row` in it (-1: all of it).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np

from longread.config import UserError
from longread.data.staging import finish_replacement

Documents = Literal["reset", "join"]
FORMAT = "longread-tokens"
FORMAT_VERSION = 1
INDEX = "index.json"
VALIDATION = "validation"
_COLUMNS = ("offset", "bytes", "source", "row")


def dtype_of(vocab_size: int) -> np.dtype:
    """Of the smallest kind that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes shards into an existing directory; `finish` writes the index last. Memory does not grow with tokens."""

    def __init__(self, directory: Path, vocab_size: int, shard_tokens: int) -> None:
        directory.mkdir(exist_ok=True)
        self.num_tokens = 0
        self.directory = directory
        self._vocab_size = vocab_size
        self._dtype = dtype_of(vocab_size)
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._sources: dict[str, int] = {}
        self._table = {name: array("q") for name in _COLUMNS}

    @property
    def num_documents(self) -> int:
        return len(self._table["offset"])

    def begin_document(self, source: str, row: int | None) -> None:
        index = self._sources.setdefault(source, len(self._sources))
        for name, value in zip(_COLUMNS, (self.num_tokens, 0, index, -1 if row is None else row), strict=True):
            self._table[name].append(value)

    def add(self, tokens: np.ndarray, num_bytes: int | None) -> None:
        """Appends to the current document: ids [n] that stand for `num_bytes` of text, None where that is unknown."""
        if len(tokens) and not 0 <= (worst := self._farthest(tokens)) < self._vocab_size:
            name = list(self._sources)[self._table["source"][-1]]
            raise UserError(
                f"token id {worst} of {name} is outside the vocabulary of {self._vocab_size}; "
                "give the tokenizer or vocab_size that it was made with"
            )
        self._table["bytes"][-1] = -1 if num_bytes is None else self._table["bytes"][-1] + num_bytes
        while len(tokens):
            if self._file is None:
                self._open_shard()
            shard = self._shards[-1]
            part = tokens[: self._shard_tokens - shard["tokens"]].astype(self._dtype)
            self._write(part.tobytes())
            shard["tokens"] += len(part)
            self.num_tokens += len(part)
            tokens = tokens[len(part) :]
            if shard["tokens"] == self._shard_tokens:
                self._close_shard()

    def finish(self, facts: dict[str, Any]) -> None:
        """Closes the last shard and writes the index with `facts` in it."""
        self._close_shard()
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            **facts,
            "num_tokens": self.num_tokens,
            "shards": self._shards,
            "sources": list(self._sources),
            "document_table": {name: column.tolist() for name, column in self._table.items()},
        }
        (self.directory / INDEX).write_text(json.dumps(index), encoding="ascii")

    def close(self) -> None:
        """Lets go of the open file, written or not."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _farthest(self, tokens: np.ndarray) -> int:
        low, high = int(tokens.min()), int(tokens.max())
        return low if low < 0 else high

    def _open_shard(self) -> None:
        name = f"tokens-{len(self._shards):05d}.bin"
        self._file = (self.directory / name).open("wb")
        self._hash = hashlib.sha256()
        self._shards.append({"file": name, "tokens": 0, "sha256": ""})

    def _write(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)
            self._hash.update(data)

    def _close_shard(self) -> None:
        if self._file is not None:
            self._shards[-1]["sha256"] = self._hash.hexdigest()
            self.close()


class TokenDataset:
    """Tokens on disk, mapped into memory: one stream of `num_tokens` ids, cut into `num_documents` documents.

    `index` is the index without its document table.
    """

    def __init__(self, directory: Path, index: dict[str, Any], table: dict[str, np.ndarray]) -> None:
        self.directory = directory
        self.index = index
        self.num_tokens: int = index["num_tokens"]
        self.num_documents = len(table["offset"])
        self.vocab_size: int = index["vocab_size"]
        self.bos_id: int | None = index["bos_id"]
        self.tokenizer_fingerprint: str | None = index["tokenizer"]
        self.documents: Documents = index["documents"]
        self.document_offsets = np.append(table["offset"], self.num_tokens)
        """int64 [num_documents + 1]: where each document starts, and the end of the last one."""
        self._table = table
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._shards = [np.memmap(directory / shard["file"], dtype=dtype, mode="r") for shard in index["shards"]]
        self._shard_starts = [0, *itertools.accumulate(len(shard) for shard in self._shards)]

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Opens what `prepare` made. Raises `UserError` with the reason when it is none, damaged or of another format.

        Sizes are checked here, checksums in `verify`. What a killed `prepare` was replacing is put in its place first.
        """
        directory = Path(directory).expanduser()
        finish_replacement(directory)
        index = read_index(directory)
        try:
            columns = index.pop("document_table")
            table = {name: np.array(columns[name], dtype=np.int64) for name in _COLUMNS}
            _check(directory, index, table)
            return cls(directory, index, table)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{directory / INDEX} is damaged ({error!r}); prepare the data again") from None
        except OSError as error:
            raise UserError(f"cannot open {directory}: {error.strerror or error}") from None

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: a stretch of the stream, with 0 <= start <= stop <= num_tokens."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        tokens = np.empty(stop - start, np.int64)
        filled = 0
        while filled < len(tokens):
            i = bisect_right(self._shard_starts, start + filled) - 1
            part = self._shards[i][start + filled - self._shard_starts[i] :][: len(tokens) - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return tokens

    def document(self, i: int) -> np.ndarray:
        """int64 [n]: document `i`, its leading BOS included where the tokenizer has one."""
        start, stop = self.document_offsets[self._document(i) :][:2].tolist()
        return self.tokens(start, stop)

    def document_bytes(self, i: int) -> int | None:
        """UTF-8 bytes of the text of document `i`; None where only its tokens were known."""
        size = int(self._table["bytes"][self._document(i)])
        return None if size < 0 else size

    def document_name(self, i: int) -> str:
        """The source that document `i` came from, with `:row` where that has many."""
        source, row = (int(self._table[name][self._document(i)]) for name in ("source", "row"))
        return self.index["sources"][source] + (f":{row}" if row >= 0 else "")

    @property
    def tokenizer_path(self) -> Path | None:
        """The argument of `load_tokenizer`; None when the data were token arrays without a tokenizer."""
        path = self.directory / "tokenizer.json"
        return path if path.exists() else None

    @property
    def validation(self) -> TokenDataset | None:
        """The documents that `prepare(validation_fraction=…)` held out."""
        directory = self.directory / VALIDATION
        return TokenDataset.open(directory) if directory.exists() else None

    def verify(self) -> None:
        """Reads every shard and raises `UserError` when one is not what was written."""
        for shard in self.index["shards"]:
            with (self.directory / shard["file"]).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise UserError(f"{self.directory / shard['file']} has changed on disk; prepare the data again")

    def _document(self, i: int) -> int:
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        return i


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a dataset of this format and version; else `UserError`."""
    path = directory / INDEX
    try:
        index = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} holds no prepared tokens; make them with: longread prepare") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON; prepare the data again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path} is not an index of Longread tokens; give a directory that longread prepare made")
    if index.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory} has format version {index.get('format_version')}; this Longread reads {FORMAT_VERSION}: "
            "prepare the data again"
        )
    return index


def _check(directory: Path, index: dict[str, Any], table: dict[str, np.ndarray]) -> None:
    """Raises `ValueError`, or `UserError` where a shard is to blame, unless index and shards agree."""
    vocab_size, bos_id, offsets = index["vocab_size"], index["bos_id"], table["offset"]
    for holds, problem in (
        (index["documents"] in get_args(Documents), "documents"),
        (isinstance(vocab_size, int) and vocab_size > 0, "vocab_size"),
        (index["dtype"] == dtype_of(vocab_size).name, "dtype"),
        (bos_id is None or (isinstance(bos_id, int) and 0 <= bos_id < vocab_size), "bos_id"),
        (index["num_tokens"] == sum(shard["tokens"] for shard in index["shards"]) > 0, "num_tokens"),
        (all(Path(shard["file"]).name == shard["file"] for shard in index["shards"]), "shards"),
        (len({len(column) for column in table.values()}) == 1 and len(offsets) > 0, "document_table"),
        (offsets[0] == 0 and (np.diff(np.append(offsets, index["num_tokens"])) > 0).all(), "offset"),
        (((table["source"] >= 0) & (table["source"] < len(index["sources"]))).all(), "source"),
    ):
        if not holds:
            raise ValueError(problem)
    for shard in index["shards"]:
        path, size = directory / shard["file"], shard["tokens"] * np.dtype(index["dtype"]).itemsize
        if not path.is_file():
            raise UserError(f"{path} is missing; prepare the data again")
        if path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes instead of {size}; prepare the data again")
