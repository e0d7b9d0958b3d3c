"""Tensor files and JSON files: versioned, checked when read, and written whole or not at all.

What holds a text, or tokens of one, is for its owner alone: `private` files and `make_private` directories.

A tensor file is a safetensors file whose metadata has one entry, "longread": a JSON object with the format
version, the kind of the file, metadata of the writer and a SHA-256 over all of it, names, shapes, dtypes and
values included. One entry, because safetensors writes several in random order and equal contents should be equal
files. Nothing here reads or writes pickle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longread.config import UserError

FORMAT = "longread"
FORMAT_VERSION = 1
MOST_HEADER_BYTES = 16 * 2**20
"""Of a tensor file; a model of the paper has 0.1 MiB. Reading a header takes several times its size."""
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor of a file: its type as safetensors calls it ("F32", "I64", ...), and its shape."""
_PRIVATE_FILE, _PRIVATE_DIRECTORY, _OTHERS = 0o600, 0o700, 0o077
_PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save writes a zip file of pickles, or a bare one


@contextlib.contextmanager
def atomic_files(*paths: Path, private: bool = False) -> Iterator[tuple[Path, ...]]:
    """Yields a temporary sibling for each path; when the block ends well, they are made durable and take its place.

    Nothing is renamed before everything is on the disk. Raises `UserError` when the disk refuses: the temporaries
    are gone then and the paths hold what they held before.

    Args:
        private: only their owner may read them, and enter the directories that are made for them.
    """
    temporaries = tuple(temporary_sibling(path) for path in paths)
    with writing(paths[0]):
        try:
            for path in paths:
                if private:
                    _make_missing(path.parent)
                path.parent.mkdir(parents=True, exist_ok=True)
            for temporary in temporaries if private else ():
                os.close(owner_only(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            yield temporaries
            for temporary in temporaries:
                make_durable(temporary)
            for temporary, path in zip(temporaries, paths, strict=True):
                os.replace(temporary, path)
            for parent in {path.parent for path in paths}:
                make_durable(parent)
        finally:
            for temporary in temporaries:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)


def owner_only(path: str | Path, flags: int) -> int:
    """Opens a file; an `opener` for `open`. Only its owner may read it: a new one from the first moment on.

    Whatever the umask is, and as far as the file system has permissions.
    """
    descriptor = os.open(path, flags, _PRIVATE_FILE)
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != _PRIVATE_FILE:
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, _PRIVATE_FILE)
    return descriptor


def make_private(directory: Path) -> None:
    """Makes a directory that only its owner may enter, or makes one that exists so.

    Raises `OSError` where that cannot be, and `UserError` where it stays open to others: it belongs to somebody else,
    or the file system has no permissions.
    """
    _make_missing(directory)
    close_to_others(directory)
    if directory.stat().st_mode & _OTHERS:
        raise UserError(f"other users may look into {directory}; run chmod 700 on it, or give another directory")


def close_to_others(path: Path) -> None:
    """Takes the permissions of everybody but the owner from a file or directory, if the system lets us; links stay."""
    with contextlib.suppress(OSError):
        mode = path.lstat().st_mode
        if mode & _OTHERS and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) & ~_OTHERS)


def _make_missing(directory: Path) -> None:
    for missing in [path for path in reversed((directory, *directory.parents)) if not os.path.exists(path)]:
        with contextlib.suppress(FileExistsError):
            missing.mkdir(_PRIVATE_DIRECTORY)
            missing.chmod(_PRIVATE_DIRECTORY)  # the umask may have taken more away


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says against writing `path` into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or choose another place" if full else "choose another place"
        raise UserError(f"cannot write {path}: {reason}; nothing there was changed, so {remedy}") from (
            error if isinstance(error, OSError) else OSError(reason)
        )


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory if it is not there, and holds it until the block ends, or the process, however that ends.

    One that was made and stays empty is gone in the end. Raises `UserError` if another holds the directory. Does
    nothing more where the file system has no locks.
    """
    made = not os.path.exists(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{directory} is in use by another process; wait for its end, or stop it") from None
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A name beside `path`, on the same file system, that no one else uses; `remove_temporaries` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def remove_temporaries(directory: Path, of: str | None = None) -> None:
    """Deletes what a killed writer left in `directory`: of the file named `of`, or of whichever.

    Only where no one else is writing them.
    """
    # ours, and those of safetensors, which has its own
    for pattern in (".*.tmp", ".tmp*") if of is None else (f".{glob.escape(of)}.*.tmp",):
        for path in directory.glob(pattern):
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Deletes a file or a directory tree as far as the system permits; symbolic links are not followed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                remove_tree(child)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def make_durable(path: Path) -> None:
    """Returns when a file's contents, or a directory's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, kind: str) -> None:
    """Writes one tensor file, in place; `write_tensors_atomically` is the safe way to replace an existing one."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format_version": FORMAT_VERSION, "kind": kind, "metadata": dict(metadata)}
    header["sha256"] = digest(header, held)
    write_safetensors(path, held, {FORMAT: json.dumps(header, sort_keys=True)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions that `path` has, or a new file; safetensors would narrow them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def write_tensors_atomically(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    kind: str = "tensors",
    private: bool = False,
) -> None:
    """Writes or replaces the tensor file at `path`: afterwards it is the new one or, after an error, the old one.

    `metadata` is anything JSON can hold. Raises `UserError` when it cannot be written, on a full disk for instance.
    """
    with atomic_files(Path(path), private=private) as (temporary,):
        write_tensors(temporary, tensors, metadata, kind=kind)


def read_tensors(
    path: str | Path, *, kind: str | None = None, check: Callable[[Layout, dict[str, Any]], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the metadata of a tensor file.

    Args:
        check: is given the layout and the metadata before any tensor is read, and may refuse them.

    Raises `UserError` with the reason when the file is missing, truncated, altered, no safetensors file, not written
    by Longread, written by a newer Longread, or not of the `kind` asked for.
    """
    path, header = Path(path), {}

    def check_header(layout: Layout, metadata: dict[str, str]) -> None:
        header.update(_header(path, metadata, kind))
        if check is not None:
            check(layout, header["metadata"])

    tensors, _ = read_safetensors(path, check=check_header)
    if header.pop("sha256", None) != digest(header, tensors):
        raise UserError(f"{path} is damaged: its contents do not match its checksum; restore it from a copy")
    return tensors, header["metadata"]


@contextlib.contextmanager
def open_tensors(path: Path, *, kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A tensor file that is read in parts, through `get_tensor` and `get_slice` of safetensors, and its metadata.

    Its checksum is of all of it and stays unread. Raises `UserError` as `read_tensors` does.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UserError(_why_no_safetensors(path, error)) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        yield file, _header(path, file.metadata() or {}, kind)["metadata"]


def _header(path: Path, metadata: dict[str, str], kind: str | None) -> dict[str, Any]:
    """The entry that all tensor files of Longread have."""
    try:
        header = json.loads(metadata[FORMAT])
        version, entries = header["format_version"], header["metadata"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path} was not written by Longread; convert it first with `longread convert`") from None
    _refuse_newer(path, version)
    if not isinstance(entries, dict):
        raise UserError(f"{path} is damaged: its metadata is no table; restore it from a copy")
    if kind is not None and header.get("kind") != kind:
        raise UserError(f"{path} holds {header.get('kind')}, not {kind}; give another file")
    return dict(header)


def read_safetensors(
    path: Path, *, check: Callable[[Layout, dict[str, str]], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of any safetensors file, copied out of it. Raises `UserError` with the reason.

    `check` is given the layout and the metadata before any tensor is read, and may refuse them.
    """
    try:
        with path.open("rb") as opened:  # unlike safe_open, says exactly what is in the way
            _refuse_long_header(path, int.from_bytes(opened.read(8), "little"))
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if check is not None:
                slices = ((name, file.get_slice(name)) for name in names)
                check({name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices}, metadata)
            return {name: file.get_tensor(name).clone() for name in names}, metadata
    except SafetensorError as error:
        raise UserError(_why_no_safetensors(path, error)) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (RuntimeError, MemoryError):  # of PyTorch, which maps the whole file
        raise UserError(f"cannot read {path}: its {path.stat().st_size} bytes are more than fit into memory") from None


def _refuse_long_header(path: Path, num_bytes: int) -> None:
    if MOST_HEADER_BYTES < num_bytes <= path.stat().st_size:
        raise UserError(
            f"{path} has a header of {num_bytes} bytes, more than the {MOST_HEADER_BYTES} of any; give another file"
        )


def _why_no_safetensors(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    size, header_size = path.stat().st_size, int.from_bytes(start[:8], "little")
    if start.startswith(_PICKLES):
        return f"{path} looks like a pickle, which can run code and is never loaded; give a safetensors file"
    if size <= 8 or (start[8:] == b"{" and 8 + header_size > size) or "not fully covered" in str(error):
        return f"{path} is truncated: {size} bytes are not all of it; restore it from a copy"
    if start[8:] == b"{":
        return f"{path} is damaged: {str(error).rpartition(': ')[2]}; restore it from a copy"
    return f"{path} is no safetensors file; give the path of a model or session that Longread wrote"


def _refuse_newer(path: Path, version: Any) -> None:
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, but this Longread reads up to {FORMAT_VERSION}; upgrade Longread"
        )


def digest(header: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of a JSON value and of the names, dtypes, shapes and bytes of `tensors`, in order of names."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_json(path: Path, values: Mapping[str, Any], *, kind: str) -> None:
    """Writes a JSON file with its format version and kind, in place."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": kind}
    path.write_text(json.dumps(header | dict(values), indent=2) + "\n", encoding="utf-8")


def write_json_atomically(path: str | Path, values: Mapping[str, Any], *, kind: str, private: bool = False) -> None:
    """Writes or replaces a JSON file. Raises `UserError` when it cannot be written; the old one is whole then."""
    with atomic_files(Path(path), private=private) as (temporary,):
        write_json(temporary, values, kind=kind)


def read_json(path: str | Path, *, kind: str) -> dict[str, Any]:
    """The values that `write_json_atomically` wrote. Raises `UserError` for a missing, damaged or foreign file."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is truncated or damaged: it is not valid JSON; restore it from a copy") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path} was not written by Longread; convert it first with `longread convert`")
    _refuse_newer(path, values.get("format_version"))
    if values.get("kind") != kind:
        raise UserError(f"{path} holds {values.get('kind')}, not {kind}; give another file")
    return values
