"""What is acknowledged is on the disk by then: every file and every name, in an order that a power cut cannot break."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.engine import Engine, Sampling, turns
from tests.held import Held
from tests.test_engine_batches import M, text
from tests.test_engine_files import crash, opened, reread, write


class Discipline:
    """Watches what a program does to a directory, and remembers of each file and folder what would survive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sizes: dict[int, int] = {}
        self._names: dict[int, set[str]] = {}
        self.removed: list[str] = []
        self.committed: set[int] = set()
        for name in ("fsync", "replace", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            real(descriptor)
            found = os.fstat(descriptor)
            with contextlib.suppress(NotADirectoryError):
                self._names[found.st_ino] = set(os.listdir(descriptor))
            self._sizes[found.st_ino] = found.st_size

        return fsync

    def _replace(self, real: Callable[..., None]) -> Callable[..., None]:
        def replace(source: Any, target: Any) -> None:
            assert self.whole(Path(source)), f"{target} would be empty after a power cut"
            if Path(target).name == "session.json":
                generation = json.loads(Path(source).read_text())["saved"]["generation"]
                if generation:
                    snapshot = Path(target).with_name(f"snapshot-{generation}.safetensors")
                    assert self.whole(snapshot), "it counts before it is there"
                    self.committed.add(generation)
            real(source, target)

        return replace

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def unlink(path: Any, **options: Any) -> None:
            found, facts = re.fullmatch(r"(?:snapshot|journal)-(\d+)\.\w+", Path(path).name), Path(path).parent
            if found and (facts / "session.json").exists():
                generation = json.loads((facts / "session.json").read_text())["saved"]["generation"]
                assert int(found[1]) < generation, "it is removed while it still counts"
                self.removed.append(found[0])
            real(path, **options)

        return unlink

    def whole(self, path: Path) -> bool:
        """Whether all of a file would survive."""
        found = path.stat()
        return self._sizes.get(found.st_ino) == found.st_size

    def check(self, directory: Path, sid: str) -> None:
        """What of a session is there would survive, under its name."""
        folder = directory / "sessions" / sid
        for path in folder.iterdir():
            assert path.stat().st_size == 0 or self.whole(path), path
            assert path.name in self._names[folder.stat().st_ino], path
        assert sid in self._names[folder.parent.stat().st_ino]

    def check_gone(self, folder: int) -> None:
        """That a session has been deleted would survive."""
        assert "session.json" not in self._names[folder]


def test_what_is_acknowledged_would_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Discipline(monkeypatch)
    engine = opened(tmp_path)
    sid = engine.create("ann", label="a").id
    disk.check(tmp_path, sid)
    for seed in range(3):
        engine.append(sid, text(20, seed)).result()
        disk.check(tmp_path, sid)
        write(engine, sid)
        disk.check(tmp_path, sid)
        engine.update(sid, label=f"label {seed}", learn=bool(seed % 2))
        disk.check(tmp_path, sid)
        path = engine.save(sid)
        assert path.name == f"snapshot-{seed + 1}.safetensors"
        disk.check(tmp_path, sid)
    assert disk.committed == {1, 2, 3}
    assert {"journal-0.jsonl", "snapshot-1.safetensors", "snapshot-2.safetensors"} <= set(disk.removed)
    fork = engine.fork(sid).id
    disk.check(tmp_path, fork)
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))  # as on a file system without links
    disk.check(tmp_path, engine.fork(sid).id)
    back = engine.restore(engine.export(sid)).id
    disk.check(tmp_path, back)
    folder = (tmp_path / "sessions" / fork).stat().st_ino
    engine.delete(fork)
    disk.check_gone(folder)
    engine.close()


def refuse(number: int = errno.ENOSPC) -> Callable[..., Any]:
    def refusing(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("what", ["append", "generate", "cancelled append"])
def test_nothing_is_acknowledged_before_it_is_on_the_disk(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(5)).result()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", held := Held(os.fsync, call=2 if what == "cancelled append" else 1))
        if what == "generate":
            task = engine.generate(sid, Sampling(max_tokens=5, seed=1))
        else:
            task = engine.append(sid, text(30 * M))
        if what == "cancelled append":
            task.cancel()  # before it is in the journal, or while it is read
        assert held.entered.wait(60)
        assert not task.done
        held.go()
        task.result(60)
    engine.close()


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    real, calls = getattr(os, name), iter(range(1, 10_000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, function)


@pytest.mark.parametrize("call", [1, 2])
def test_an_append_that_was_refused_is_in_nobodys_way(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the folder's entry nor by the file: what is acknowledged afterwards is read again after a crash."""
    engine = opened(tmp_path)
    sid = engine.create().id
    with monkeypatch.context() as patch:
        failing_once(patch, "fsync", call)
        with pytest.raises(UserError):
            engine.append(sid, text(9, 1)).result()
    assert engine.append(sid, text(20, 2)).result().position == 20
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == 20
    assert write(engine, sid) == reread(engine, text(20, 2))
    engine.close()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_disk_that_does_not_take_the_end_of_a_text_loses_nothing_after_it(
    how: str, snapshot: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(3)).result()
    with monkeypatch.context() as patch:
        patch.setattr(turns, "read", held := Held(turns.read, call=2))
        task = engine.append(sid, text(300 * M))
        assert held.entered.wait(60)
        failing_once(patch, "fsync", 1)
        if how == "failed":
            patch.setattr(turns, "read", refuse())
        else:
            task.cancel()
        held.go()
        with pytest.raises((UserError, OSError)):
            task.result(60)
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
    end: Callable[[Engine], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tmp_path)
    sid = engine.create(label="old").id
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse())
        for change in ({"label": "new"}, {"learn": False}, {"label": "new", "learn": False}):
            with pytest.raises(UserError):
                engine.update(sid, **change)  # type: ignore[arg-type]
            info = engine.info(sid)
            assert (info.label, info.learn) == ("old", True)
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
        patch.setattr(turns, "read", held := Held(turns.read))
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
