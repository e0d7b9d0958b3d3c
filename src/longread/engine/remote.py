"""Session files on a shared storage, at addresses like s3://bucket/session.safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.extras import install_command
from longread.files import owner_only


def is_remote(path: str | Path) -> bool:
    """Whether this is an address like s3://bucket/session.safetensors and no path of this machine."""
    return "://" in str(path)


def copy_out(path: Path, url: str) -> None:
    """Copies a file to a shared storage. Raises `UserError` with the reason where it cannot be written."""
    filesystem, there = _storage(url)
    try:
        filesystem.put_file(str(path), there)
    except Exception as error:
        raise UserError(f"cannot write {url}: {error}") from None


def copy_in(url: str, path: Path) -> None:
    """Copies a file from a shared storage. Raises `UserError` with the reason where it cannot be read."""
    filesystem, there = _storage(url)
    os.close(owner_only(path, os.O_WRONLY | os.O_CREAT))
    try:
        filesystem.get_file(there, str(path))
    except Exception as error:
        raise UserError(f"cannot read {url}: {error}") from None


def _storage(url: str) -> tuple[Any, str]:
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"{url} needs fsspec; run {install_command('fsspec')}") from None
    try:
        filesystem, there = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} cannot be used: {error}") from None
    return filesystem, there
