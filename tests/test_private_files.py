"""Who may read what: files that hold texts, or tokens of texts, are for their owner alone, whatever the umask is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from longread import files
from longread.config import UserError
from longread.data import prepare
from longread.engine import Engine
from longread.files import atomic_files, make_private, owner_only, write_json_atomically, write_tensors_atomically
from longread.server.service import Service
from longread.server.sessions.transfer import _received
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests.test_engine import read
from tests.test_engine_batches import INNER, make, text
from tests.test_engine_files import crash


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def open_to_others(top: Path) -> list[str]:
    return [f"{path.name} {mode(path):o}" for path in (top, *top.rglob("*")) if mode(path) & 0o077]


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o177], ids="{:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_private_files_are_so_from_their_first_byte_on(umask: int, tmp_path: Path) -> None:
    target = tmp_path / "new" / "deeper" / "x"
    with atomic_files(target, private=True) as (temporary,):
        assert mode(temporary) == 0o600
        assert not temporary.read_bytes()
        temporary.write_text("a text")
        assert mode(temporary) == 0o600
    assert mode(target) == 0o600
    assert [mode(path) for path in (target.parent, target.parent.parent)] == [0o700, 0o700]


def test_every_writer_of_private_files(umask: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_tensors_atomically(tmp_path / "tensors", {"a": torch.zeros(3)}, {}, private=True)
    write_json_atomically(tmp_path / "json", {}, kind="k", private=True)
    with open(tmp_path / "opened", "xb", opener=owner_only):
        pass
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}
    assert mode(tmp_path) == 0o755, "a directory of the user stays as it is"


def test_what_is_there_is_tightened(tmp_path: Path) -> None:
    old, directory = tmp_path / "old", tmp_path / "directory"
    old.write_text("before")
    old.chmod(0o666)
    directory.mkdir()
    directory.chmod(0o2775)
    with open(old, "a", opener=owner_only) as file:
        file.write(" and after")
    make_private(directory)
    assert mode(old) == 0o600
    assert mode(directory) == 0o700
    with atomic_files(old, private=True) as (temporary,):
        temporary.write_text("new")
    assert mode(old) == 0o600


def test_what_stays_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a directory that belongs to somebody else, or one on a file system without permissions."""
    shared = tmp_path / "sessions"
    shared.mkdir()
    shared.chmod(0o755)

    def refused(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    model = make()
    with pytest.raises(UserError, match=r"other users may look into .*sessions; run chmod 700 on it, or give another"):
        Engine(model, INNER, directory=tmp_path)


def test_links_and_what_they_lead_to_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "elsewhere").chmod(0o644)
    (tmp_path / "link").symlink_to("elsewhere")
    files.close_to_others(tmp_path / "link")
    files.close_to_others(tmp_path / "nowhere")
    assert mode(tmp_path / "elsewhere") == 0o644


def test_a_saved_session(umask: int, tmp_path: Path) -> None:
    session = Session(make(), INNER)
    session.read(text(9))
    session.save(tmp_path / "of" / "mine" / "book.session")
    assert mode(tmp_path / "of" / "mine" / "book.session") == 0o600
    assert mode(tmp_path / "of") == 0o700


def test_everything_an_engine_keeps(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "kept"
    engine = Engine(make(), INNER, directory=top)
    sid = engine.create(label="a title").id
    read(engine, sid, text(9))
    engine.save(sid)
    read(engine, sid, text(5))
    fork = engine.fork(sid).id
    monkeypatch.setattr(os, "link", refuse)
    copied = engine.fork(sid).id
    read(engine, fork, text(3))
    engine.restore(engine.export(sid))
    read(engine, copied, text(3))
    kinds = {path.suffix for path in top.rglob("*") if path.is_file()}
    assert kinds == {"", ".db", ".db-wal", ".safetensors"}
    assert open_to_others(top) == []
    engine.close()
    assert open_to_others(top) == []


def test_a_directory_from_before_is_tightened(tmp_path: Path) -> None:
    engine = Engine(make(), INNER, directory=tmp_path)
    sid, damaged = engine.create().id, engine.create().id
    for session in (sid, damaged):
        read(engine, session, text(9))
        engine.save(session)
        read(engine, session, text(5))
    crash(engine)
    sessions = tmp_path / "sessions"
    (sessions / damaged / "session.db").write_text("no longer a database")
    for path in (sessions, *sessions.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with Engine(make(), INNER, directory=tmp_path) as engine:
        assert engine.info(sid).position == 14
        assert (sessions / f"{damaged}.lost").is_dir()
        assert open_to_others(sessions) == []


def test_uploads_on_their_way(umask: int, tmp_path: Path) -> None:
    seen = []

    class Upload:
        """A request whose body looks at what the server makes of it."""

        async def stream(self) -> AsyncIterator[bytes]:
            yield b"the first block"
            seen.extend(path for path in tmp_path.rglob("*") if path.is_file())
            assert open_to_others(tmp_path / "passing") == []

    with Engine(make(), INNER) as engine:
        service = Service(
            engine, ByteTokenizer(), engine.model.config, "tiny", engine.fingerprint, "cpu", tmp_path / "passing"
        )
        service.tidy()

        async def receive() -> None:
            async with _received(service, cast("Any", Upload())):
                pass

        asyncio.run(receive())
    assert [path.suffix for path in seen] == [".upload"]


def test_a_data_set(umask: int, tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i} texts that somebody has written " * 20)
    prepare([str(tmp_path / "*.txt")], tmp_path / "data", ByteTokenizer(), validation_fraction=0.5)
    assert (tmp_path / "data" / "validation").is_dir()
    assert open_to_others(tmp_path / "data") == []


def refuse(*_: object) -> None:
    raise OSError
