"""Session files: snapshots of a session and what they hold beside it, and copies on a shared storage, at addresses like
s3://bucket/session.safetensors.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.engine.curve import Curve
from longread.engine.interface import Appended
from longread.engine.records import Answer
from longread.extras import install_command
from longread.files import owner_only


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Facts about a session at its snapshot; `generation` 0: there is none yet."""

    generation: int = 0
    position: int = 0
    steps: int = 0
    rolled_back: int = 0
    nbytes: int = 0
    drift: float = 0.0
    learn: bool | None = None
    losses: Curve = field(default_factory=Curve)
    answers: tuple[Answer, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, which has no NaN."""
        values = dataclasses.asdict(self) | {"losses": self.losses.as_json()}
        for answer in values["answers"]:
            answer["result"]["nll"] = [None if math.isnan(x) else x for x in answer["result"]["nll"]]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Saved:
        """What `as_json` gave. Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for anything else."""
        answers = []
        for answer in values["answers"]:
            result = dict(answer["result"])
            result["nll"] = [math.nan if x is None else float(x) for x in result["nll"]]
            answers.append(Answer(answer["start"], answer["digest"], answer["key"], Appended(**result)))
        numbers = {name: int(values[name]) for name in ("generation", "position", "steps", "rolled_back", "nbytes")}
        losses = Curve.from_json(values["losses"]) if "losses" in values else Curve.beginning(numbers["position"])
        return cls(
            **numbers, drift=float(values["drift"]), learn=values["learn"], losses=losses, answers=tuple(answers)
        )


def snapshot_path(folder: Path, generation: int) -> Path:
    """Where the session file of a snapshot is, in the folder of its session."""
    return folder / f"snapshot-{generation}.safetensors"


def snapshots_in(folder: Path) -> list[tuple[int, Path]]:
    """All that are there, with their generations."""
    found = ((re.fullmatch(r"snapshot-(\d+)\.safetensors", path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in found if match]


def check_whole(path: Path) -> None:
    """Refuses a snapshot that is missing or cut off; its contents are checked when the session is wanted."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            text = file.read(min(header, size))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    ends = [int(end) for end in re.findall(rb'"data_offsets":\s*\[\d+,\s*(\d+)\]', text)]
    if size < 8 or len(text) < header or size != 8 + header + max(ends, default=0):
        raise UserError(f"{path} is truncated: {size} bytes are not all of it; restore it from a copy")


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
