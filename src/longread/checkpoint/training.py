"""The checkpoints of a run: everything that training needs to go on as if it had never stopped.

    RUN/checkpoints/step-00000100/
        config.json, model.safetensors    a model directory (longread.checkpoint.model)
        optimizer.safetensors             the optimizer's moments, by parameter name
        state.json                        step, config, position in the data and in the metrics
        manifest.json                     size and SHA-256 of each of these
        COMMITTED                         SHA-256 of the manifest; written last

A checkpoint is written in a hidden directory, made durable, renamed, and marked; without the mark it does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from longread.checkpoint.model import CONFIG_FILE, KIND, WEIGHTS_FILE, write_model
from longread.config import InnerConfig, UserError
from longread.files import (
    atomic_files,
    make_durable,
    read_json,
    read_tensors,
    remove_temporaries,
    remove_tree,
    temporary_sibling,
    write_json,
    write_tensors,
    writing,
)
from longread.model import Transformer

CHECKPOINTS = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"
_KIND = "training checkpoint"


class Checkpoint(NamedTuple):
    """What `read_checkpoint` found; the tensors lie on the CPU."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(
    run: Path,
    step: int,
    *,
    model: Transformer,
    inner: InnerConfig,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer_fingerprint: str | None = None,
    keep: int = 2,
    spare: Path | None = None,
) -> Path:
    """Writes the checkpoint of `step` finished steps, then deletes all but the newest `keep` and `spare`.

    Raises `UserError` when it cannot be written; the older checkpoints are still whole then.
    """
    path = run / CHECKPOINTS / f"step-{step:08d}"
    aside = temporary_sibling(path)
    with writing(path):
        try:
            aside.mkdir(parents=True)
            provenance = {"step": step}
            write_model(aside / WEIGHTS_FILE, aside / CONFIG_FILE, model, inner, tokenizer_fingerprint, provenance)
            write_tensors(aside / OPTIMIZER_FILE, optimizer, {"step": step}, kind="optimizer")
            write_json(aside / STATE_FILE, {"step": step} | dict(state), kind=_KIND)
            files = {file.name: _size_and_sum(file) for file in sorted(aside.iterdir())}
            write_json(aside / MANIFEST_FILE, {"files": files}, kind="manifest")
            for file in aside.iterdir():
                make_durable(file)
            make_durable(aside)
            _discard(path)  # one of this step that was never committed, or did not pass its checksums
            os.replace(aside, path)
            make_durable(path.parent)
        finally:
            remove_tree(aside)
    with atomic_files(path / MARKER_FILE) as (marker,):
        marker.write_text(_size_and_sum(path / MANIFEST_FILE)["sha256"])
    _keep_newest(run, keep, spare)
    return path


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest committed checkpoint of a run that passes its checksums; None if none was ever committed.

    Warns of each that does not pass. Raises `UserError` if none of the committed ones does.
    """
    committed = _committed(Path(run))
    failures = []
    for path in reversed(committed):
        try:
            verify_checkpoint(path)
        except UserError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            warnings.warn(f"{failure}; going back to {path.name}", stacklevel=2)
        return path
    if failures:
        raise UserError(f"no checkpoint of {run} can be used: {failures[0]}")
    return None


def verify_checkpoint(path: Path) -> None:
    """Raises `UserError` with the reason if the checkpoint was not committed or a byte of it has changed."""
    marker = path / MARKER_FILE
    if not marker.is_file():
        raise UserError(f"{path} is no finished checkpoint: writing it was interrupted; use an older one")
    manifest = path / MANIFEST_FILE
    try:
        if _size_and_sum(manifest)["sha256"] != marker.read_text().strip():
            raise UserError(f"{manifest} is damaged: it does not match the checkpoint's commit marker")
        for name, expected in read_json(manifest, kind="manifest")["files"].items():
            found = _size_and_sum(path / name)
            if found["bytes"] != expected["bytes"]:
                raise UserError(f"{path / name} is truncated: it has {found['bytes']} of {expected['bytes']} bytes")
            if found["sha256"] != expected["sha256"]:
                raise UserError(f"{path / name} is damaged: its contents do not match the manifest")
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{marker} is damaged: it holds no checksum") from None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Everything in a checkpoint, checked. Raises `UserError` with the reason when it is not whole."""
    path = Path(path)
    verify_checkpoint(path)
    state = read_json(path / STATE_FILE, kind=_KIND)
    model, _ = read_tensors(path / WEIGHTS_FILE, kind=KIND)
    optimizer, _ = read_tensors(path / OPTIMIZER_FILE, kind="optimizer")
    return Checkpoint(path, state["step"], model, optimizer, state)


def _size_and_sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _committed(run: Path) -> list[Path]:
    return sorted(marker.parent for marker in (run / CHECKPOINTS).glob(f"step-*/{MARKER_FILE}"))


def _keep_newest(run: Path, keep: int, spare: Path | None) -> None:
    kept = {*_committed(run)[-keep:], spare}
    for path in (run / CHECKPOINTS).glob("step-*"):
        if path not in kept:
            _discard(path)
    remove_temporaries(run / CHECKPOINTS)


def _discard(path: Path) -> None:
    """Deletes a checkpoint, its mark first: half deleted, it must not look finished."""
    with contextlib.suppress(OSError):
        (path / MARKER_FILE).unlink(missing_ok=True)
        remove_tree(path)
