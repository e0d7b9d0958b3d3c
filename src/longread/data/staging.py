"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longread.config import UserError


@contextmanager
def staged_directory(out: Path, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yields a new directory beside `out` and renames it to `out` at the end. Only its owner may look into it.

    An `out` that exists and is not empty is refused unless `may_replace(out)`; then it stays until the new one is
    complete. On any error nothing is left behind and `out` is as it was; an `OSError` becomes a `UserError`. A kill
    leaves `out` as it was, or as `finish_replacement` makes it, or replaced; the next removes what it leaves beside.
    """
    out = Path(os.path.realpath(out))  # a link stays, what it leads to is replaced
    finish_replacement(out)
    missing_parents = [parent for parent in out.parents if not parent.exists()]
    token = secrets.token_hex(4)
    staging, previous = (out.with_name(f".{out.name}.{token}.{suffix}") for suffix in ("new", "old"))
    complete = False
    held = contextlib.ExitStack()
    try:
        if _occupied(out) and not (may_replace and may_replace(out)):
            raise UserError(f"{out} exists; choose another place, or ask to overwrite it if it is a dataset")
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.parent):
            _remove_abandoned(out)
            staging.mkdir(0o700)
            held.enter_context(_locked(staging))
        yield staging
        _flush(staging)
        if out.exists():
            out.rename(previous)
        try:
            staging.rename(out)
        except FileNotFoundError:
            if not out.exists():
                raise  # else a process that wanted to open `out` just now has finished the replacement
        complete = True
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; nothing was changed there") from None
    finally:
        if previous.exists() and not complete and not out.exists():
            previous.rename(out)
        shutil.rmtree(previous if complete else staging, ignore_errors=True)
        held.close()
        if not complete:
            with contextlib.suppress(OSError):
                for parent in missing_parents:
                    parent.rmdir()


def finish_replacement(out: Path) -> None:
    """Takes the second rename of `staged_directory` for a process that was killed before it: of `out`, or around `out`.

    Only between the two renames are both hidden directories there, the new one complete, and `out` is not. A process
    that is alive after all finds its work done. Raises `UserError` when the place refuses.
    """
    out = Path(os.path.realpath(out))
    for place in (out.parent, out):
        pattern = f".{glob.escape(place.name)}.{'[0-9a-f]' * 8}.old"
        for previous in [] if os.path.exists(place) else place.parent.glob(pattern):  # Path.exists may raise
            staging = previous.with_suffix(".new")
            if os.path.exists(place) or not os.path.exists(staging):
                continue
            try:
                staging.rename(place)
            except OSError as error:
                if not os.path.exists(place):  # else another process was faster
                    raise UserError(
                        f"replacing {place} was interrupted and cannot be finished: {error.strerror}; "
                        f"rename {staging} to it"
                    ) from None
            else:
                shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Waits until nobody else holds the directory, and holds it; does nothing where the file system has no locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(out: Path) -> None:
    """Removes what killed processes left: what nobody holds, unless both parts of a replacement wait for its end."""
    pattern = f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}"
    for staging in out.parent.glob(f"{pattern}.new"):
        if not staging.with_suffix(".old").exists() and not _is_held(staging):
            shutil.rmtree(staging, ignore_errors=True)
    for previous in out.parent.glob(f"{pattern}.old"):
        if out.exists() and not previous.with_suffix(".new").exists():
            shutil.rmtree(previous, ignore_errors=True)


def _is_held(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _occupied(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _flush(top: Path) -> None:
    """Makes everything below `top` survive a power cut before the rename does, and leaves it to its owner alone."""
    for path in (top, *top.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    for path in (*top.rglob("*"), top, top.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
