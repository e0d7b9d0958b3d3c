"""From what the user names to the files that are meant: files, directories, globs, hub names, token arrays."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from longread.config import UserError
from longread.data.kinds import refuse_address

Kind = Literal["text", "jsonl", "parquet", "hub", "array"]
HUB_PREFIX = "hf:"
_KIND_OF_SUFFIX: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


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
    refuse_address(spec)
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
