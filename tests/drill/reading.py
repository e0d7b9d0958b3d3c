"""What is read and converted beside a run that writes checkpoints and deletes them."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Self

from longread import checkpoint
from longread.cli import main
from longread.config import UserError
from tests.drill.judging import Wrong
from tests.forked import PROCESSES

STATUSES = {0: "read", 2: "refused", -9: "killed"}


class Reading:
    """While it is entered, the newest checkpoint is read and converted, again and again.

    Each is that of the undisturbed run, or refused in one sentence: it has just been deleted.
    """

    def __init__(self, run: Path, whole: Path, directory: Path) -> None:
        self._run, self._whole, self._directory = run, whole, directory
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._counts = dict.fromkeys(STATUSES.values(), 0)
        self._problem: str | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def found(self) -> str:
        """How often something was read, refused, and killed while it was. Raises `Wrong` if something else came."""
        if self._problem or not self._counts["read"]:
            raise Wrong(self._problem or "nothing was read")
        return ", ".join(f"{count} {name}" for name, count in self._counts.items() if count)

    def _go_on(self) -> None:
        number = 0
        while not (self._end.is_set() or self._problem):
            committed = sorted((self._run / "checkpoints").glob("*/COMMITTED"))
            if not committed:
                self._end.wait(0.01)
                continue
            number += 1
            path = committed[-1 if number % 2 else 0].parent  # the one that is deleted next, too
            expected = self._whole / "checkpoints" / path.name
            try:
                self._read(path, expected)
                self._convert(path, expected, kill=number % 5 == 0)
            except Exception as problem:
                self._problem = f"{path.name} is read: {type(problem).__name__}: {problem}"

    def _read(self, path: Path, expected: Path) -> None:
        try:
            found = checkpoint.load_model(path)
        except UserError:
            self._counts["refused"] += 1
            return
        self._counts["read"] += 1
        if found.fingerprint != checkpoint.load_model(expected).fingerprint:
            raise Wrong("it is another model than that of the undisturbed run")

    def _convert(self, path: Path, expected: Path, kill: bool) -> None:
        out, other = (self._directory / "converted" / name for name in ("found", "expected"))
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        process = PROCESSES.Process(target=_convert, args=(str(path), str(out), self._directory / "convert"))
        process.start()
        if kill:
            process.join(0.02)
            process.kill()
        process.join()
        self._counts[STATUSES[process.exitcode]] += 1
        if process.exitcode != 0:
            if out.exists() and process.exitcode == 2:
                raise Wrong("a conversion that was refused has left something")
            return
        _convert_or_fail(str(expected), str(other))
        if _bytes_of(out) != _bytes_of(other):
            raise Wrong("what was converted is not the undisturbed run's")


def _convert(source: str, out: str, said: Path) -> None:
    written = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.exit(main(["convert", source, out]))


def _convert_or_fail(source: str, out: str) -> None:
    process = PROCESSES.Process(target=_convert, args=(source, out, Path(os.devnull)))
    process.start()
    process.join()
    if process.exitcode:
        raise Wrong(f"{source} cannot be converted")


def _bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
