"""Files are written whole or not at all, and a file that is not what it should be is refused with the reason."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longread import files
from longread.config import UserError
from tests.forked import Forked


def some_tensors() -> dict[str, Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(7),
        "c": torch.arange(4).to(torch.bfloat16),
        "none": torch.empty(0, 3),
    }


def flip(path: Path, position: int, bit: int = 0) -> None:
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1 << bit
    path.write_bytes(contents)


def test_safetensors_that_cannot_write_are_the_disk_too(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot write") as refused:
            files.write_tensors_atomically(tmp_path / "f", {"a": torch.zeros(10_000)}, {}, kind="k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert isinstance(refused.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    files.write_tensors_atomically(path, some_tensors(), {"position": 3, "config": {"lr": 0.5}}, kind="session")
    tensors, metadata = files.read_tensors(path, kind="session")
    assert metadata == {"position": 3, "config": {"lr": 0.5}}
    assert tensors.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [child.name for child in path.parent.iterdir()] == ["x.safetensors"]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.write_tensors_atomically(tmp_path / "x", some_tensors(), {})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_equal_contents_are_equal_files(tmp_path: Path) -> None:
    contents = set()
    for i in range(8):
        files.write_tensors_atomically(tmp_path / f"{i}", some_tensors(), {"a": 1, "b": 2})
        contents.add((tmp_path / f"{i}").read_bytes())
    assert len(contents) == 1


def test_tensors_read_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_tensors_atomically(path, {"a": torch.zeros(1000)}, {})
    tensors, _ = files.read_tensors(path)
    flip(path, -1, bit=5)
    assert not tensors["a"].any()


def test_a_flip_of_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_tensors_atomically(path, some_tensors(), {"position": 3})
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position, bit=position % 8)
        with pytest.raises(UserError, match=r"x\.safetensors"):
            files.read_tensors(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_tensors_atomically(path, some_tensors(), {})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated"):
            files.read_tensors(path)


def newer(path: Path) -> None:
    header = {"format_version": files.FORMAT_VERSION + 1, "kind": "tensors", "metadata": {}, "sha256": ""}
    save_file({"a": torch.ones(1)}, path, metadata={"longread": json.dumps(header)})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: save_file({"a": torch.ones(1)}, path), "not written by Longread"),
        (lambda path: save_file({"a": torch.ones(1)}, path, metadata={"longread": "[]"}), "not written by Longread"),
        (newer, "upgrade Longread"),
        (lambda path: path.write_text("Call me Ishmael. Some years ago"), "no safetensors file"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "pickle"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "pickle"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: None, "No such file"),
        (lambda path: files.write_tensors_atomically(path, {}, {}, kind="session"), "holds session, not model"),
    ],
)
def test_what_is_no_tensor_file_of_ours_is_refused_with_the_reason(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "x"
    write(path)
    with pytest.raises(UserError, match=reason):
        files.read_tensors(path, kind="model")


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, number: int, call: int) -> None:
    """Lets the `call`-th use of os.`function` fail with error `number`."""
    real, calls = getattr(os, function), itertools.count()

    def refusing(*args: object, **kwargs: object) -> object:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, refusing)


def test_everything_is_on_the_disk_before_anything_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents, then names, in the order given, then the directory: a power cut leaves old files or new ones."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renaming(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    with files.atomic_files(tmp_path / "a", tmp_path / "b") as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert events == [
        *[("fsync", str(temporary)) for temporary in temporaries],
        *[("rename", str(tmp_path / name)) for name in ("a", "b")],
        ("fsync", str(tmp_path)),
    ]


@pytest.mark.parametrize(
    ("function", "number"), [("fsync", errno.ENOSPC), ("replace", errno.EROFS), ("open", errno.EACCES)]
)
def test_a_refusing_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    path = tmp_path / "x"
    files.write_tensors_atomically(path, {"a": torch.zeros(1)}, {})
    refuse(monkeypatch, function, number, call=0)
    with pytest.raises(UserError, match=f"cannot write {path}: {os.strerror(number)}"):
        files.write_tensors_atomically(path, {"a": torch.ones(1)}, {})
    assert files.read_tensors(path)[0]["a"] == 0
    assert list(tmp_path.iterdir()) == [path]


def write_in_little_room(path: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        files.write_tensors_atomically(path, {"a": torch.ones(9999)}, {})
    except UserError as error:
        print(error)


def test_a_file_size_limit_stops_the_write_in_the_middle(tmp_path: Path) -> None:
    """The real thing, without patches: the kernel refuses after 4096 bytes."""
    files.write_tensors_atomically(tmp_path / "x", {"a": torch.zeros(1)}, {})
    process = Forked(write_in_little_room, tmp_path / "x", 4096)
    said, errors = process.communicate(300)
    assert process.returncode == 0, errors
    assert "File too large" in said
    assert files.read_tensors(tmp_path / "x")[0]["a"] == 0
    assert [child.name for child in tmp_path.iterdir()] == ["x"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.write_tensors_atomically(tmp_path / "file" / "x", {}, {})
