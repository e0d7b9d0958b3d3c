"""What is acknowledged is on the disk by then: every file and every name, in an order that a power cut cannot break."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.engine import Engine, Sampling, pieces
from longread.engine.database import read_database
from tests.disk import Disk, refusing
from tests.held import Held
from tests.test_engine_batches import M, text
from tests.test_engine_files import crash, opened, reread, write


class Discipline:
    """Watches what a program does to a directory, and remembers of each file and folder what would survive."""

    def __init__(self, disk: Disk, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sizes: dict[int, int] = {}
        self._names: dict[int, set[str]] = {}
        self._copies = copies
        self.removed: list[str] = []
        self.counting: set[int] = set()
        disk.hook = self._passing
        for name in ("replace", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))

    def _passing(self, operation: str, path: Path, call: Callable[..., Any]) -> None:
        call()
        if operation == "sync":
            found = path.stat()
            if path.is_dir():
                self._names[found.st_ino] = set(os.listdir(path))
            self._sizes[found.st_ino] = found.st_size
            if path.name == "session.db-wal" and path.parent != self._copies:
                self._check_snapshot(path.parent)

    def _replace(self, real: Callable[..., None]) -> Callable[..., None]:
        def replace(source: Any, target: Any) -> None:
            assert self.whole(Path(source)), f"{target} would be empty after a power cut"
            real(source, target)
            if Path(target).name == "session.db":
                self._check_snapshot(Path(target).parent)

        return replace

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def unlink(path: Any, **options: Any) -> None:
            found, folder = re.fullmatch(r"snapshot-(\d+)\.safetensors", Path(path).name), Path(path).parent
            if found and (folder / "session.db").exists():
                assert int(found[1]) < self._counts(folder), "it is removed while it still counts"
                self.removed.append(found[0])
            real(path, **options)

        return unlink

    def _check_snapshot(self, folder: Path) -> None:
        generation = self._counts(folder)
        if generation:
            assert self.whole(folder / f"snapshot-{generation}.safetensors"), "it counts before it is there"
            self.counting.add(generation)

    def _counts(self, folder: Path) -> int:
        """The snapshot that would count if the process ended now."""
        copy = self._copies / "session.db"
        for end in ("", "-wal"):
            Path(f"{copy}{end}").unlink(missing_ok=True)
            if (folder / f"session.db{end}").exists():
                shutil.copy(folder / f"session.db{end}", f"{copy}{end}")
        _, contents = read_database(copy)
        assert contents.session is not None
        assert contents.damage is None
        return int(contents.session["saved"]["generation"])

    def whole(self, path: Path) -> bool:
        """Whether all of a file would survive."""
        found = path.stat()
        return self._sizes.get(found.st_ino) == found.st_size

    def check(self, directory: Path, sid: str) -> None:
        """What of a session is there would survive, under its name."""
        folder = directory / "sessions" / sid
        for path in folder.iterdir():
            assert path.stat().st_size == 0 or self.whole(path), path
            assert path.stat().st_size == 0 or path.name in self._names[folder.stat().st_ino], path
        assert sid in self._names[folder.parent.stat().st_ino]

    def check_gone(self, folder: int) -> None:
        """That a session has been deleted would survive."""
        assert "session.db" not in self._names[folder]


def test_what_is_acknowledged_would_survive_a_power_cut(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, directory = tmp_path / "copies", tmp_path / "kept"
    copies.mkdir()
    watch = Discipline(disk, copies, monkeypatch)
    engine = opened(directory)
    sid = engine.create("ann", label="a").id
    watch.check(directory, sid)
    for seed in range(3):
        engine.append(sid, text(20, seed)).result()
        watch.check(directory, sid)
        write(engine, sid)
        watch.check(directory, sid)
        engine.update(sid, label=f"label {seed}", learn=bool(seed % 2))
        watch.check(directory, sid)
        path = engine.save(sid)
        assert path.name == f"snapshot-{seed + 1}.safetensors"
        watch.check(directory, sid)
    assert watch.counting == {1, 2, 3}
    assert set(watch.removed) == {"snapshot-1.safetensors", "snapshot-2.safetensors"}
    fork = engine.fork(sid).id
    watch.check(directory, fork)
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))  # as on a file system without links
    watch.check(directory, engine.fork(sid).id)
    back = engine.restore(engine.export(sid)).id
    watch.check(directory, back)
    folder = (directory / "sessions" / fork).stat().st_ino
    engine.delete(fork)
    watch.check_gone(folder)
    engine.close()


def refuse(number: int = errno.ENOSPC) -> Callable[..., Any]:
    def refusing(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("what", ["append", "generate", "cancelled append"])
def test_nothing_is_acknowledged_before_it_is_on_the_disk(what: str, tmp_path: Path, disk: Disk) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(5)).result()
    held = Held(lambda: None, call=2 if what == "cancelled append" else 1)

    def holding(operation: str, path: Path, call: Callable[..., Any]) -> None:
        if operation == "sync":
            held()
        call()

    disk.hook = holding
    if what == "generate":
        task = engine.generate(sid, Sampling(max_tokens=5, seed=1))
    else:
        task = engine.append(sid, text(30 * M))
    if what == "cancelled append":
        task.cancel()  # before it is on the disk, or while it is read
    assert held.entered.wait(60)
    assert not task.done
    held.go()
    task.result(60)
    engine.close()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_append_that_was_refused_is_in_nobodys_way(call: int, tmp_path: Path, disk: Disk) -> None:
    """Neither by the folder's entry nor by the file: what is acknowledged afterwards is read again after a crash."""
    engine = opened(tmp_path)
    sid = engine.create().id
    usual, disk.hook = disk.hook, refusing(call=call)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; nothing there was changed"):
        engine.append(sid, text(9, 1)).result()
    disk.hook = usual
    assert engine.append(sid, text(20, 2)).result().position == 20
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == 20
    assert write(engine, sid) == reread(engine, text(20, 2))
    engine.close()


@pytest.mark.parametrize("operation", ["sync", "write"])
@pytest.mark.parametrize("before", [0, 20])
def test_what_was_refused_does_not_come_back_after_a_crash(
    before: int, operation: str, tmp_path: Path, disk: Disk
) -> None:
    """Though all of it may have been in the file when its sync failed."""
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(before, 1)).result()
    disk.hook = refusing(errno.EIO, operation=operation)
    with pytest.raises(UserError, match=r"cannot write .*: Input/output error"):
        engine.append(sid, text(9, 2)).result()
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == before
    engine.close()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_disk_that_does_not_take_the_end_of_a_text_loses_nothing_after_it(
    how: str, snapshot: bool, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(3)).result()
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "read", held := Held(pieces.read, call=2))
        task = engine.append(sid, text(300 * M))
        assert held.entered.wait(60)
        usual, disk.hook = disk.hook, refusing(call=1)
        if how == "failed":
            patch.setattr(pieces, "read", refuse())
        else:
            task.cancel()
        held.go()
        with pytest.raises((UserError, OSError)):
            task.result(60)
        disk.hook = usual
    stopped = engine.info(sid).position
    assert 3 < stopped < 300 * M
    if snapshot:
        engine.save(sid)
    assert engine.append(sid, text(20, 2)).result().position == stopped + 20
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == stopped + 20
    assert write(engine, sid) == reread(engine, text(3), text(300 * M)[: stopped - 3], text(20, 2))
    engine.close()


@pytest.mark.parametrize("end", [Engine.close, crash], ids=["closed", "killed"])
def test_a_change_that_could_not_be_kept_has_not_happened(
    end: Callable[[Engine], None], tmp_path: Path, disk: Disk
) -> None:
    engine = opened(tmp_path)
    sid = engine.create(label="old").id
    usual, disk.hook = disk.hook, refusing()
    for change in ({"label": "new"}, {"learn": False}, {"label": "new", "learn": False}):
        with pytest.raises(UserError):
            engine.update(sid, **change)  # type: ignore[arg-type]
        info = engine.info(sid)
        assert (info.label, info.learn) == ("old", True)
    disk.hook = usual
    assert engine.update(sid, label="newer").label == "newer"
    end(engine)
    engine = opened(tmp_path)
    info = engine.info(sid)
    assert (info.label, info.learn) == ("newer", True)
    engine.close()


@pytest.mark.parametrize("end", [Engine.close, crash], ids=["closed", "killed"])
@pytest.mark.parametrize("tokens", [0, 30])
def test_a_session_weighs_something_after_any_end(
    end: Callable[[Engine], None], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(tokens)).result()
    nbytes = engine.info(sid).nbytes
    empty = engine.create().nbytes
    end(engine)
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "read", held := Held(pieces.read))
        engine = opened(tmp_path)
        if tokens and end is crash:
            assert held.entered.wait(60)
            held.go()
        assert engine.info(sid).nbytes >= empty > 0
        engine.append(sid, []).result()
        held.go()
    assert engine.info(sid).nbytes == nbytes
    assert all(info.nbytes for info in engine.sessions())
    engine.close()
