"""A disk that a test can watch, hold and break: for `os.fsync`, and for what SQLite does by itself.

SQLite reaches the disk through tables of functions (https://www.sqlite.org/vfs.html), which a program may replace.
"""

from __future__ import annotations

import _sqlite3  # type: ignore[import-not-found]
import ctypes
import errno
import os
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest

Hook = Callable[[str, Path, Callable[..., Any]], Any]
"""Is given "write", "truncate" or "sync", the file, and what does it; raises `OSError` for what the disk does not do.

What writes takes the number of bytes to write, all of them by default.
"""
_METHODS: dict[str, tuple[int, Any]] = {
    "write": (3, CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)),
    "truncate": (4, CFUNCTYPE(c_int, c_void_p, c_int64)),
    "sync": (5, CFUNCTYPE(c_int, c_void_p, c_int)),
}
"""Places in the table of an open file, and types."""
_LENGTHS = {1: 13, 2: 17, 3: 19}
"""Of that table, by its version."""
_FULL = 13
_FAILED = {"write": 10 | 3 << 8, "truncate": 10 | 6 << 8, "sync": 10 | 4 << 8}
_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, POINTER(c_int))
_used: list[Any] = []  # databases may stay open longer than a test, so what they call stays where it is


class _Vfs(ctypes.Structure):
    _fields_ = [
        *(("version", c_int), ("size_of_file", c_int), ("longest_path", c_int), ("next", c_void_p)),
        *(("name", c_char_p), ("data", c_void_p), ("open", _OPEN), ("others", c_void_p * 14)),
    ]


class Disk:
    """Databases that are opened while the context lasts, and every `os.fsync` in it, pass `hook`."""

    def __init__(self) -> None:
        self.hook: Hook = lambda operation, path, call: call()
        self._failures: list[BaseException] = []
        library = ctypes.CDLL(_sqlite3.__file__)
        try:
            self._find, self._register = library.sqlite3_vfs_find, library.sqlite3_vfs_register
        except AttributeError:
            pytest.skip("this Python hides its SQLite")
        self._find.restype = POINTER(_Vfs)
        self._usual = self._find(None)
        self._watched = _Vfs.from_buffer_copy(self._usual.contents)
        self._watched.name, self._watched.next, self._watched.open = b"watched", None, _OPEN(self._open)
        self._patch = pytest.MonkeyPatch()
        _used.append(self)

    def __enter__(self) -> Disk:
        fsync = os.fsync
        named = "/proc/self/fd/{}".format
        self._patch.setattr(
            os, "fsync", lambda file: self.hook("sync", Path(os.readlink(named(file))), lambda: fsync(file))
        )
        self._register(ctypes.byref(self._watched), 1)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        self._register(self._usual, 1)
        self.hook = lambda operation, path, call: call()
        for failure in self._failures:
            raise failure

    def _open(self, vfs: int, name: int | None, file: int, flags: int, out: Any) -> int:
        found: int = self._usual.contents.open(vfs, name, file, flags, out)  # which keeps the pointer `name`
        if found == 0 and name is not None:
            path = Path(os.fsdecode(ctypes.string_at(name)))
            methods = ctypes.cast(file, POINTER(c_void_p))
            length = _LENGTHS[ctypes.cast(methods[0], POINTER(c_int))[0]]
            table = (c_void_p * length).from_buffer_copy(ctypes.string_at(methods[0], 8 * length))
            for operation, (place, kind) in _METHODS.items():
                function = kind(self._passing(operation, path, kind(table[place])))
                _used.append(function)
                table[place] = ctypes.cast(function, c_void_p).value
            methods[0] = ctypes.addressof(table)
            _used.append(table)
        return found

    def _passing(self, operation: str, path: Path, real: Callable[..., int]) -> Callable[..., int]:
        def function(file: int, *args: Any) -> int:
            def call(count: int | None = None) -> None:
                given = (args[0], args[1] if count is None else count, args[2]) if operation == "write" else args
                results.append(real(file, *given))

            results: list[int] = []
            try:
                self.hook(operation, path, call)
            except OSError as error:
                return _FULL if error.errno == errno.ENOSPC else _FAILED[operation]
            except BaseException as error:  # of a hook that checks something: nobody above would hear of it
                self._failures.append(error)
                return _FAILED[operation]
            return results[-1] if results else 0

        return function


def refusing(number: int = errno.ENOSPC, *, operation: str = "sync", call: int | None = None) -> Hook:
    """A disk that does not do something: never, or only the n-th time not."""
    calls = 0

    def hook(asked: str, path: Path, do: Callable[..., Any]) -> Any:
        nonlocal calls
        if asked == operation:
            calls += 1
            if call in (None, calls):
                raise OSError(number, os.strerror(number))
        return do()

    return hook
