"""The checkpoints of a run: everything that training needs to go on as if it had never stopped.

    RUN/checkpoints/step-00000100/
        config.json, model.safetensors    a model directory (longread.checkpoint.model)
        optimizer.safetensors             the optimizer's moments, by parameter name; where there were several ranks,
                                          of each its rows: optimizer-00001-of-00002.safetensors (.moments, .sharded)
        state.json                        step, config, position in the data and in the metrics
        manifest.json                     size and SHA-256 of each of these
        COMMITTED                         SHA-256 of the manifest; written last

A checkpoint is written in a hidden directory, made durable, renamed, and marked; without the mark it does not exist.
Several ranks write into one directory, which all of them must see. Each makes its own file durable and says its sum;
rank 0 does all else. What fails on one of them is agreed before anything is waited for.

Old checkpoints are deleted, never written over. Who has a file of one open goes on reading what was there (POSIX); who
comes to open it finds it gone, and is told so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from longread.checkpoint.model import CONFIG_FILE, KIND, WEIGHTS_FILE, write_model
from longread.checkpoint.moments import KIND as OPTIMIZER_KIND, OPTIMIZER_FILE, read_moments
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
from longread.parallel import ALONE, DividedRows, World

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"
_KIND = "training checkpoint"


class Checkpoint(NamedTuple):
    """A checkpoint as `read_checkpoint` gives it; the tensors lie on the CPU, rows of moments where their mesh is."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Moments as `parameter.moment`, whole or of the rows that were asked for."""
    state: dict[str, Any]


def place_of(run: Path, step: int) -> Path:
    """The directory of the checkpoint of `step` finished steps."""
    return run / CHECKPOINTS / f"step-{step:08d}"


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
    milestone_every: int | None = None,
    spare: Path | None = None,
    world: World = ALONE,
) -> Path:
    """Writes the checkpoint of `step` finished steps, then deletes those that are not `kept`.

    All ranks of `world` call it together; rank 0's model and state are written.

    Args:
        optimizer: the moments; of several ranks what `longread.checkpoint.sharded.staged_moments` gave each.

    Raises `UserError` when it cannot be written, on all ranks; the older checkpoints are still whole then.
    """
    path = place_of(run, step)
    aside = Path(world.first(str(temporary_sibling(path)), "the name of a checkpoint"))
    try:
        with world.together("making a directory"), writing(path):
            if world.is_first:
                aside.mkdir(parents=True)
        with world.together("finding the directory of rank 0"):
            if not aside.is_dir():
                raise UserError(
                    f"{path.parent} is not what rank 0 sees there; train where all machines see one directory"
                )
        if world.size > 1:
            from longread.checkpoint.sharded import write_moments  # with DCP, which takes two seconds to import

            with writing(path):
                files = [write_moments(aside, optimizer, step, world)]
        else:
            files = [aside / OPTIMIZER_FILE]
            with writing(path):
                write_tensors(files[0], optimizer, {"step": step}, kind=OPTIMIZER_KIND)
        with world.together("writing the model"), writing(path):
            if world.is_first:
                weights, config = aside / WEIGHTS_FILE, aside / CONFIG_FILE
                write_model(weights, config, model, inner, tokenizer_fingerprint, {"step": step})
                write_json(aside / STATE_FILE, {"step": step} | dict(state), kind=_KIND)
                files += [weights, config, aside / STATE_FILE]
            sums = {file.name: _size_and_sum(file) for file in files}
            for file in files:
                make_durable(file)
        found = world.each(sums, "the sums of the files")
        with world.together("committing the checkpoint"), writing(path):
            if world.is_first:
                _publish(aside, path, {name: each[name] for each in found for name in each})
    finally:
        if world.is_first:
            remove_tree(aside)
    if world.is_first:
        delete_old(run, path, keep=keep, milestone_every=milestone_every, spare=spare)
    return path


def _publish(aside: Path, path: Path, sums: Mapping[str, Any]) -> None:
    """Gives a directory of durable files with these sums its name, and the mark."""
    write_json(aside / MANIFEST_FILE, {"files": dict(sorted(sums.items()))}, kind="manifest")
    make_durable(aside / MANIFEST_FILE)
    make_durable(aside)
    _discard(path)  # one of this step that was never committed, or did not pass its checksums
    os.replace(aside, path)
    make_durable(path.parent)
    with atomic_files(path / MARKER_FILE) as (marker,):
        marker.write_text(_size_and_sum(path / MANIFEST_FILE)["sha256"])


def kept(
    committed: Sequence[Path], *, keep: int = 2, milestone_every: int | None = None, spare: Path | None = None
) -> set[Path]:
    """Which checkpoints stay: the newest `keep`, `spare`, and the milestones.

    Milestones are the first checkpoint at or after each multiple of `milestone_every` steps, so they do not depend on
    a checkpoint being due just there.

    Args:
        committed: all that are finished, the oldest first.
    """
    stay = {*committed[-keep:], *([] if spare is None else [spare])}
    if milestone_every is not None:
        first_of = {int(path.name.rpartition("-")[2]) // milestone_every: path for path in reversed(committed)}
        stay |= {path for stretch, path in first_of.items() if stretch > 0}
    return stay


def newest_checkpoint(run: str | Path, world: World = ALONE) -> Path | None:
    """The newest committed checkpoint of a run that passes its checksums; None if none was ever committed.

    All ranks of `world` call it together and get the same. Rank 0 warns of each that does not pass. Raises `UserError`
    if none of the committed ones does.
    """
    committed = world.first([str(path) for path in _committed(Path(run))], "the list of checkpoints")
    failures = []
    for path in map(Path, reversed(committed)):
        failure = _failure(path, world)
        if failure is not None:
            failures.append(failure)
            continue
        for failure in failures if world.is_first else ():
            warnings.warn(f"{failure}; going back to {path.name}", stacklevel=2)
        return path
    if failures:
        raise UserError(f"no checkpoint of {run} can be used: {failures[0]}")
    return None


def verify_checkpoint(path: Path, world: World = ALONE) -> None:
    """Raises `UserError` with the reason if the checkpoint was not committed or a byte of it has changed.

    All ranks of `world` call it together: each reads a part of the files, and all raise the same.
    """
    failure = _failure(path, world)
    if failure is not None:
        raise UserError(failure)


def _failure(path: Path, world: World) -> str | None:
    """Why the checkpoint cannot be used; the same on all ranks."""
    mine = None
    try:
        _verify(path, world.rank, world.size)
    except UserError as error:
        mine = str(error)
    found = world.word(mine, f"checking {path.name}")
    return None if found is None else found[1]


def _verify(path: Path, first: int, every: int) -> None:
    """`verify_checkpoint` of the mark, the manifest and each `every`-th of the files that it lists."""
    marker = path / MARKER_FILE
    if not marker.is_file():
        raise UserError(f"{path} is no finished checkpoint: writing it was interrupted; use an older one")
    manifest = path / MANIFEST_FILE
    try:
        if _size_and_sum(manifest)["sha256"] != marker.read_text().strip():
            raise UserError(f"{manifest} is damaged: it does not match the checkpoint's commit marker")
        listed = read_json(manifest, kind="manifest")["files"]
        for name, expected in list(listed.items())[first::every]:
            found = _size_and_sum(path / name)
            if found["bytes"] != expected["bytes"]:
                what = "truncated" if found["bytes"] < expected["bytes"] else "damaged"
                raise UserError(f"{path / name} is {what}: it has {found['bytes']} of {expected['bytes']} bytes")
            if found["sha256"] != expected["sha256"]:
                raise UserError(f"{path / name} is damaged: its contents do not match the manifest")
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{marker} is damaged: it holds no checksum") from None


def read_checkpoint(path: str | Path, world: World = ALONE, rows: DividedRows | None = None) -> Checkpoint:
    """Everything in a checkpoint, checked. Raises `UserError` with the reason when it is not whole.

    However many ranks wrote it. All ranks of `world` call it together, each with its `rows`, whose moments it gets;
    without rows moments are whole.
    """
    path = Path(path)
    verify_checkpoint(path, world)
    with world.together(f"reading {path.name}"):
        state = read_json(path / STATE_FILE, kind=_KIND)
        model, _ = read_tensors(path / WEIGHTS_FILE, kind=KIND)
        return Checkpoint(path, state["step"], model, read_moments(path, rows), state)


def _size_and_sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _committed(run: Path) -> list[Path]:
    return sorted(marker.parent for marker in (run / CHECKPOINTS).glob(f"step-*/{MARKER_FILE}"))


def delete_old(
    run: Path, newest: Path, *, keep: int = 2, milestone_every: int | None = None, spare: Path | None = None
) -> None:
    """Deletes the checkpoints before `newest` that are not `kept`, and what killed writers have left.

    What lies beyond `newest` did not pass when the run went back to it. It does not count, and is written anew.
    """
    beyond = {path for path in _committed(run) if path > newest}
    committed = [path for path in _committed(run) if path <= newest]
    stay = kept(committed, keep=keep, milestone_every=milestone_every, spare=spare) | beyond | {newest}
    for path in (run / CHECKPOINTS).glob("step-*"):
        if path not in stay:
            _discard(path)
    remove_temporaries(run / CHECKPOINTS)


def _discard(path: Path) -> None:
    """Deletes a checkpoint, its mark first: half deleted, it must not look finished."""
    with contextlib.suppress(OSError):
        (path / MARKER_FILE).unlink(missing_ok=True)
        remove_tree(path)
