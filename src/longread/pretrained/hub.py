"""Models of the Hugging Face Hub that lie in its cache already. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from longread.config import UserError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Cached(NamedTuple):
    """One revision of a model in the cache."""

    directory: Path
    revision: str


def is_hub_name(source: str) -> bool:
    """Whether `source` can be the name of a model on the Hub."""
    return bool(_NAME.fullmatch(source))


def find_cached(name: str) -> Cached:
    """The newest revision of the model called `name` (owner/model) that the cache has.

    Raises:
        UserError: it is not there.
    """
    cache = _cache()
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        kept = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        revision = kept[-1].name if kept else ""
    directory = folder / "snapshots" / revision
    if not revision or not directory.is_dir():
        raise UserError(
            f"{name} is no directory here and not in the cache of the Hugging Face Hub ({cache}); fetch it first "
            f"with `hf download {name}`"
        )
    return Cached(directory, revision)


def _cache() -> Path:
    """Where huggingface_hub keeps what it has fetched."""
    said = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if said:
        return Path(said).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return base.expanduser() / "hub"
