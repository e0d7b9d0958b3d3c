"""In which order a checkpoint is written and deleted, and files that are in the place of others."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from longread import checkpoint
from longread.checkpoint import training
from longread.config import UserError
from tests.test_checkpoint import INNER, make_model, refuse, write_run


def test_all_is_durable_before_it_has_its_name_and_marked_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may stop between any two of these."""
    events: list[tuple[str, str]] = []
    make_durable, replace = training.make_durable, os.replace

    def syncing(path: Path) -> None:
        events.append(("sync", path.name))
        make_durable(path)

    def renaming(old: Path, new: Path) -> None:
        events.append(("name", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(training, "make_durable", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    write_run(tmp_path, 1)
    named = events.index(("name", "step-00000001"))
    files = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    before = [name for what, name in events[:named] if what == "sync"]
    assert files == set(before[:-1])
    assert before[-1].startswith(".step-00000001")  # the directory that holds them, last
    after = events[named + 1 :]
    assert after[0] == ("sync", "checkpoints")
    assert ("name", "COMMITTED") in after


def test_a_checkpoint_that_is_half_deleted_does_not_look_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, 1, 2)

    def failing(path: Path) -> None:
        raise OSError(errno.EIO, "cannot delete")

    with monkeypatch.context() as patch:
        patch.setattr(training, "remove_tree", lambda path: failing(path) if path.name == "step-00000001" else None)
        newest = write_run(tmp_path, 3)
    assert not (path.with_name("step-00000001") / "COMMITTED").exists()
    assert (path.with_name("step-00000001") / "model.safetensors").exists()
    assert checkpoint.newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_what_could_not_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    older = write_run(tmp_path, 1)
    with monkeypatch.context() as patch:
        refuse(patch, function, errno.ENOSPC, 0)
        with pytest.raises(UserError, match="No space left"):
            write_run(tmp_path, 2)
    assert list(older.parent.iterdir()) == [older]


def test_two_checkpoints_are_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        path = checkpoint.write_checkpoint(tmp_path, step, model=make_model(), inner=INNER, optimizer={}, state={})
    assert sorted(child.name for child in path.parent.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_without_its_mark_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path, 1)
    (path / "COMMITTED").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="COMMITTED is damaged: it holds no checksum"):
        checkpoint.read_checkpoint(path)
    (path / "COMMITTED").unlink()
    with pytest.raises(UserError, match="writing it was interrupted; use an older one"):
        checkpoint.read_checkpoint(path)


def commit(path: Path) -> None:
    """Marks a checkpoint whose files are as they are."""
    files = {file.name: training._size_and_sum(file) for file in path.iterdir() if "manifest" not in file.name}
    files.pop("COMMITTED")
    training.write_json(path / "manifest.json", {"files": files}, kind="manifest")
    (path / "COMMITTED").write_text(training._size_and_sum(path / "manifest.json")["sha256"])


@pytest.mark.parametrize(
    ("name", "other", "reason"),
    [
        ("model.safetensors", "optimizer.safetensors", "model.safetensors holds optimizer, not model"),
        ("optimizer.safetensors", "model.safetensors", "optimizer.safetensors holds model, not optimizer"),
    ],
)
def test_a_file_in_the_place_of_another_is_refused(tmp_path: Path, name: str, other: str, reason: str) -> None:
    path = write_run(tmp_path, 1)
    shutil.copy(path / other, path / name)
    commit(path)
    with pytest.raises(UserError, match=reason):
        checkpoint.read_checkpoint(path)
    if name == "model.safetensors":
        with pytest.raises(UserError, match=reason):
            checkpoint.load_model(path)


def test_a_model_is_loaded_onto_a_device(tmp_path: Path) -> None:
    checkpoint.save_model(tmp_path / "m", make_model(), INNER, None)
    loaded = checkpoint.load_model(tmp_path / "m", device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in loaded.model.parameters()} == {("meta", torch.float64)}


def test_where_nothing_is_the_kinds_of_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a model, a run or a checkpoint directory"):
        checkpoint.load_model(tmp_path / "nowhere")
