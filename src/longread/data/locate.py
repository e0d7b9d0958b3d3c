"""From what the user names to the files that are meant: files, directories, globs, hub names, token arrays; and how the
text files among them are read."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal

from longread.config import UserError
from longread.data.text import NotText, TextFormat, decode_text, unpacked

Kind = Literal["text", "jsonl", "parquet", "hub", "array"]
HUB_PREFIX = "hf:"
BLOCK_BYTES = 1 << 16
"""Of a text file that are read at a time."""
_KIND_OF_SUFFIX: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_ADDRESS = re.compile(r"(https?|ftp)://", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One thing to read. `named`: the user wrote exactly this, so being unable to use it is an error."""

    name: str
    kind: Kind
    named: bool


def locate(specs: Iterable[str | Path], *, exclude: Sequence[str] = (), out: Path | None = None) -> list[Source]:
    """Every source behind `specs`, in order, a file once only.

    A directory is walked in sorted order without hidden files, without following links to directories, and without
    `out`. `exclude` holds patterns like `test`, `*.min.js` or `docs/*`: a file of a directory or glob is left out when
    one matches its name, a folder above it, or its path below the directory. Raises `UserError` when something named
    does not exist or nothing is found in it.
    """
    found: dict[str, Source] = {}
    for spec in map(str, specs):
        for source in _behind(spec, exclude, out):
            key = source.name if source.kind == "hub" else os.path.realpath(source.name)
            if key not in found or source.named:
                found[key] = source
    if not found:
        raise UserError("there is nothing to read; name at least one file, directory, glob or hf: dataset")
    return list(found.values())


def _behind(spec: str, exclude: Sequence[str], out: Path | None) -> list[Source]:
    if spec.startswith(HUB_PREFIX):
        return [Source(spec, "hub", named=True)]
    if _ADDRESS.match(spec):
        raise UserError(f"{spec} is an address, not a file; download it first, for example with curl -LO")
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        node = _zarr_node(path)
        if node == "array":
            return [Source(path, "array", named=True)]
        if node == "group":
            arrays = sorted(name for name in os.listdir(path) if _zarr_node(os.path.join(path, name)) == "array")
            examples = ", ".join(f"{spec}/{name}" for name in arrays[:8]) or f"{spec}/train"
            raise UserError(f"{spec} is a group of token arrays; name one of them, for example {examples}")
        sources = [_source(file, named=False) for file in _walk(path, exclude, out)]
    elif os.path.exists(path):
        return [_source(path, named=True)]
    elif glob.has_magic(path):
        sources = list(_matches(path, exclude, out))
    else:
        raise UserError(f"{spec} does not exist or cannot be reached; check the path")
    if not sources:
        raise UserError(f"{spec} holds no file to read; check the path and what is excluded")
    return sources


def _source(path: str, named: bool) -> Source:
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    return Source(path, _KIND_OF_SUFFIX.get(suffix, "text"), named)


def _walk(top: str, exclude: Sequence[str], out: Path | None) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}; make it readable or exclude it")

    for folder, subfolders, files in os.walk(top, onerror=refuse):
        if _zarr_node(folder):
            raise UserError(f"{folder} is a token array inside a directory of files; name it by itself or exclude it")
        subfolders[:] = [
            name
            for name in sorted(subfolders)
            if not name.startswith(".")
            and not _excluded(os.path.relpath(os.path.join(folder, name), top), exclude)
            and not (out and _is_within(os.path.join(folder, name), out))
        ]
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path) and not _excluded(os.path.relpath(path, top), exclude):
                yield path


def _matches(pattern: str, exclude: Sequence[str], out: Path | None) -> Iterator[Source]:
    fixed = os.path.dirname(re.split(r"[*?\[]", pattern)[0]) or "."
    for match in sorted(glob.glob(pattern, recursive=True)):
        if _excluded(os.path.relpath(match, fixed), exclude) or (out and _is_within(match, out)):
            continue
        if os.path.isfile(match):
            yield _source(match, named=False)
        elif _zarr_node(match) == "array":
            yield Source(match, "array", named=True)


def _is_within(path: str, out: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out))


def _excluded(path: str, patterns: Sequence[str]) -> bool:
    whole = Path(path)
    names = [whole.as_posix(), *(parent.as_posix() for parent in whole.parents[:-1]), *whole.parts]
    return any(fnmatchcase(name, pattern.rstrip("/")) for pattern in patterns for name in names)


def _zarr_node(path: str) -> Literal["array", "group"] | None:
    """The kind of a directory in Zarr's formats 2 and 3."""
    folder = Path(path)
    if (folder / ".zarray").is_file():
        return "array"
    if (folder / ".zgroup").is_file():
        return "group"
    try:
        kind = json.loads((folder / "zarr.json").read_bytes())["node_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return "array" if kind == "array" else "group"


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
