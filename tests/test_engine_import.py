"""Directories as they were before there were databases: taken over once, and whole, whatever happens in between."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.engine import Engine
from tests.journals import as_journals
from tests.test_engine_batches import INNER, make, text
from tests.test_engine_files import crash, opened, reread, write

ID = "806d1b88606667cd697fb82240854184"
FACTS = """{
  "format": "longread",
  "format_version": 1,
  "kind": "engine-session",
  "fingerprint": "feac87cbac81377012e4a2404f99d97792e7826c257195830eff237c2182e797",
  "facts": {"owner": "ann", "label": "y", "learn": true, "created": 1796058026.2462044, "used": 1796058026.8455977},
  "saved": {
    "generation": 0, "position": 0, "steps": 0, "rolled_back": 0, "nbytes": 0, "drift": 0.0, "learn": null,
    "losses": {"first": 0, "end": 0, "width": 1, "sums": [], "scored": [], "written": []},
    "answers": []
  }
}
"""
DIGEST = "5df6059dec3d531cdbb0bfc94da4828799a346815ae3abd702ff23532d07e2bd"
JOURNAL = f"""\
85970c8d {{"at":0,"tokens":[15,4,0,0,11,7,5,9,9,4],"learn":true,"digest":"{DIGEST}","key":null}}
9563f6b8 {{"at":10,"tokens":[16,9,12,10],"learn":true,"wrote":true}}
523204b1 {{"at":14,"tokens":[7,12,10,8,18],"learn":true}}
"""
FINGERPRINT = "feac87cbac81377012e4a2404f99d97792e7826c257195830eff237c2182e797"


TOKENS = [15, 4, 0, 0, 11, 7, 5, 9, 9, 4], [16, 9, 12, 10], [7, 12, 10, 8, 18]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A session that an engine without databases has left when it was killed, to the letter."""
    folder = tmp_path / "sessions" / ID
    folder.mkdir(parents=True)
    (folder / "session.json").write_text(FACTS)
    (folder / "journal-0.jsonl").write_text(JOURNAL)
    return folder


def engine_of(folder: Path) -> Engine:
    return Engine(make(), INNER, directory=folder.parent.parent, fingerprint=FINGERPRINT)


def test_a_session_goes_on(folder: Path) -> None:
    engine = engine_of(folder)
    assert {path.name for path in folder.iterdir()} == {"session.db"}
    assert engine.append(ID, TOKENS[0], expected_position=0).result().position == 10, "it was acknowledged then"
    info = engine.info(ID)
    assert (info.position, info.owner, info.label, info.learn) == (19, "ann", "y", True)
    crash(engine)
    engine = engine_of(folder)
    assert (engine.lost, engine.info(ID).created) == ([], 1796058026.2462044)
    assert write(engine, ID) == reread(engine, *TOKENS)
    engine.close()


def test_a_damaged_journal_is_taken_over_up_to_the_damage(folder: Path) -> None:
    (folder / "journal-0.jsonl").write_text(JOURNAL.replace("[16,", "[17,"))
    engine = engine_of(folder)
    (lost,) = engine.lost
    assert (lost.id, lost.owner, lost.position, lost.restored) == (ID, "ann", 19, 10)
    assert lost.reason.startswith("line 2 of ")
    assert write(engine, ID) == reread(engine, TOKENS[0])
    engine.close()
    assert (folder / "journal-0.jsonl.damaged").exists()
    assert engine_of(folder).lost == []


def test_the_end_of_a_journal_that_was_cut_off_was_never_acknowledged(folder: Path) -> None:
    (folder / "journal-0.jsonl").write_text(JOURNAL[:-5])
    with engine_of(folder) as engine:
        assert (engine.lost, engine.info(ID).position) == ([], 14)


@pytest.mark.parametrize("content", ["", "no JSON", FACTS[:100], FACTS.replace('"owner"', '"author"')])
def test_damaged_facts_are_reported(content: str, folder: Path) -> None:
    (folder / "session.json").write_text(content)
    with engine_of(folder) as engine:
        assert [(lost.id, lost.position, lost.restored) for lost in engine.lost] == [(ID, 19, 0)]
    assert (folder.with_name(f"{ID}.lost") / "session.json").read_text() == content


def test_sessions_of_another_model_wait_for_it(folder: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 1 sessions in .* belong to another model"):
        opened(folder.parent.parent, num_heads=4)
    assert {path.name for path in folder.iterdir()} == {"session.json", "journal-0.jsonl"}


@pytest.mark.parametrize("end", [Engine.close, crash], ids=["closed", "killed"])
def test_snapshots_and_what_came_after_them(end: Callable[[Engine], None], tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create("ann").id
    engine.append(sid, text(30)).result()
    engine.save(sid)
    engine.append(sid, text(9, 1), expected_position=30).result()
    fork, empty = engine.fork(sid, "a fork").id, engine.create("bob").id
    before = {info.id: (info.owner, info.label, info.position, info.created) for info in engine.sessions()}
    end(engine)
    as_journals(tmp_path)
    assert not list(tmp_path.rglob("*.db*"))
    for _ in range(2):
        engine = opened(tmp_path)
        assert {i.id: (i.owner, i.label, i.position, i.created) for i in engine.sessions()} == before
        end(engine)
    engine = opened(tmp_path)
    assert engine.append(sid, text(9, 1), expected_position=30).result().position == 39
    assert write(engine, sid) == write(engine, fork) == reread(engine, text(30), text(9, 1))
    assert engine.info(empty).position == 0
    engine.close()
    assert not list(tmp_path.rglob("*.json*"))


def test_it_goes_on_wherever_it_was_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the end of the process before its n-th change of the disk, for every n."""

    class KilledError(BaseException):
        pass

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                raise KilledError
            return real(*args, **kwargs)

        return function

    files = {path: path.read_bytes() for path in folder.iterdir()}
    for number in itertools.count():
        for path in folder.iterdir():
            path.unlink()
        for path, content in files.items():
            path.write_bytes(content)
        left = iter(range(number, -1000, -1))
        try:
            with monkeypatch.context() as patch:
                for name in ("fsync", "replace", "unlink", "rename", "link"):
                    patch.setattr(os, name, counted(getattr(os, name)))
                engine_of(folder).close()
            break
        except KilledError:
            with engine_of(folder) as engine:
                assert (engine.lost, engine.info(ID).position) == ([], 19)
    assert number > 4
