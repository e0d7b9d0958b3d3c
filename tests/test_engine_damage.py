"""Damaged, hostile and foreign files of an engine: what is lost is said, and the rest goes on."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from longread.config import UserError
from longread.engine import Engine
from longread.engine.curve import Curve
from longread.engine.interface import Lost
from longread.engine.recovery import Recovered, consistent, furthest, replayed
from longread.engine.snapshots import Saved
from longread.engine.store import Store
from longread.files import read_tensors, write_safetensors, write_tensors_atomically
from tests.test_engine_batches import text
from tests.test_engine_files import crash, files, opened, reread, write


def damage(how: str, path: Path) -> None:
    data = path.read_bytes()
    if how == "cut off":
        path.write_bytes(data[:-1])
    elif how == "half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif how == "gone":
        path.unlink()
    elif how == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    elif how == "not a number":
        tensors, metadata = read_tensors(path)
        write_tensors_atomically(path, tensors | {"output": tensors["output"] * torch.nan}, metadata, kind="session")
    elif how == "wrong shape":
        tensors, metadata = read_tensors(path)
        write_tensors_atomically(path, tensors | {"output": tensors["output"][:, :3]}, metadata, kind="session")
    elif how == "path traversal":
        write_safetensors(path, {"../../x": torch.zeros(3)})
    elif how == "pickle":
        path.write_bytes(b"\x80\x04N.")


DAMAGE = ("cut off", "half", "empty", "flipped", "gone", "huge header", "not a number", "wrong shape")


class Killed(NamedTuple):
    """What an engine left, which no test changes: two sessions of 30 tokens, one of them saved and gone on with."""

    home: Path
    saved: str
    other: str
    snapshot: Path
    """Of the one that is saved, in `home`."""
    written: list[int]
    """What the other writes next."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    home = tmp_path_factory.mktemp("killed")
    engine = opened(home)
    saved, other = engine.create("ann").id, engine.create().id
    for sid in (saved, other):
        engine.append(sid, text(30)).result()
    path = engine.save(saved)
    engine.append(saved, text(3)).result()
    crash(engine)
    return Killed(home, saved, other, path.relative_to(home), reread(engine, text(30)))


@pytest.mark.parametrize("how", [*DAMAGE, "path traversal", "pickle"])
def test_damaged_snapshots_are_reported_and_others_go_on(how: str, killed: Killed, tmp_path: Path) -> None:
    broken, good = killed.saved, killed.other
    shutil.copytree(killed.home, tmp_path, dirs_exist_ok=True)
    damage(how, tmp_path / killed.snapshot)
    engine = opened(tmp_path)
    if not engine.lost:  # found when it is wanted, by then at the latest
        with pytest.raises(UserError, match=r"is lost at position 33|there is no session"):
            engine.append(broken, text(5)).result()
    (lost,) = engine.lost
    assert (lost.id, lost.owner, lost.position, lost.restored) == (broken, "ann", 33, 0)
    assert [info.id for info in engine.sessions()] == [good]
    assert write(engine, good) == killed.written
    engine.close()
    assert opened(tmp_path).lost == []  # it was said once, and the files are kept aside
    assert (tmp_path / "sessions" / f"{broken}.lost").is_dir()


@pytest.mark.parametrize("how", ["half", "empty", "flipped", "gone"])
def test_damaged_facts_are_reported(how: str, killed: Killed, tmp_path: Path) -> None:
    sid = killed.other
    shutil.copytree(killed.home / "sessions" / sid, tmp_path / "sessions" / sid)
    damage(how, tmp_path / "sessions" / sid / "session.db")
    engine = opened(tmp_path)
    if how == "flipped":  # within the text of a number, perhaps: it need not matter
        assert len(engine.sessions()) + len(engine.lost) == 1
    elif how == "gone":  # as if it had been deleted
        assert (engine.sessions(), engine.lost) == ([], [])
    else:
        assert [(lost.id, lost.position) for lost in engine.lost] == [(sid, 30)]
    engine.close()


def test_a_damaged_database_is_restored_up_to_the_damage(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    for seed in range(3):
        engine.append(sid, text(10, seed)).result()
    crash(engine)
    path = tmp_path / "sessions" / sid / "session.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE event SET body = replace(body, '[', '(') WHERE number = 2")
    path.with_name("session.db-wal").touch()  # of an engine that was killed before it wrote anything
    engine = opened(tmp_path)
    (lost,) = engine.lost
    assert (lost.id, lost.position, lost.restored) == (sid, 30, 10)
    assert engine.append(sid, text(10, 5)).result().position == 20
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert write(engine, sid) == reread(engine, text(10), text(10, 5))
    engine.close()
    assert path.with_name("session.db.damaged").exists()


def test_what_was_never_acknowledged_may_be_missing(tmp_path: Path) -> None:
    """The end of a log, cut off by a crash while it was written."""
    engine = opened(tmp_path)
    sid = engine.create().id
    for seed in range(2):
        engine.append(sid, text(10, seed)).result()
    crash(engine)
    (log,) = files(tmp_path, "session.db-wal")
    log.write_bytes(log.read_bytes()[:-5])
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == 10
    engine.append(sid, text(10, 1)).result()
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == 20
    engine.close()


@pytest.mark.parametrize("end", [Engine.close, crash])
def test_sessions_of_another_model_wait_for_it(tmp_path: Path, end: Callable[[Engine], None]) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(9)).result()
    end(engine)
    with pytest.raises(UserError, match=r"1 of 1 sessions in .* belong to another model; start with the model that"):
        opened(tmp_path, num_heads=4)
    engine = opened(tmp_path)
    assert (engine.lost, engine.info(sid).position) == ([], 9)
    engine.close()


VICTIM, OTHER = "a" * 32, "b" * 32
FACTS = {"owner": "ann", "label": "", "learn": True, "created": 1.0, "used": 2.0}


def events_from(at: int) -> Iterator[dict[str, Any]]:
    """Short ones and long ones."""
    for length in itertools.cycle((3, 40, 700)):
        yield {"at": at, "tokens": list(range(length)), "learn": True}
        at += length


@pytest.fixture(scope="module", params=["closed", "killed"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a store with two sessions, one of them with a snapshot and events after it."""
    directory = tmp_path_factory.mktemp("kept")
    store = Store(directory, "model")
    for sid in (VICTIM, OTHER):
        store.create(sid, FACTS)
        for event in itertools.islice(events_from(0), 7):
            store.log(sid, [event])
    begun, position = store.begin(VICTIM), furthest(store.reopen(VICTIM)[1])
    write_safetensors(begun.path, {})
    store.commit(VICTIM, FACTS, Saved(position=position, losses=Curve.beginning(position)), begun)
    for event in itertools.islice(events_from(position), 7):
        store.log(VICTIM, [event])
    contents = {path: path.read_bytes() for path in directory.glob("*/session.db*")}
    store.release()
    for path, content in contents.items() if request.param == "killed" else ():
        path.write_bytes(content)
    return directory


def recovered(directory: Path) -> tuple[Store, dict[str, Recovered], dict[str, Lost]]:
    store = Store(directory, "model")
    return store, {found.id: found for found in store.recover()}, {lost.id: lost for lost in store.lost}


def check_damaged(kept: Path, directory: Path, name: str, damaging: Callable[[bytearray], object]) -> None:
    """Damages one session, and checks that it goes on as far as is told, with what it held, and the other whole."""
    shutil.copytree(kept, directory / "whole")
    store, whole, _ = recovered(directory / "whole")
    store.release()
    place = directory / "damaged"
    shutil.copytree(kept, place)
    content = bytearray((place / VICTIM / name).read_bytes())
    damaging(content)
    (place / VICTIM / name).write_bytes(content)
    store, found, lost = recovered(place)
    assert OTHER not in lost
    assert (found[OTHER].facts, found[OTHER].events) == (FACTS, whole[OTHER].events)
    if VICTIM in found:
        session, expected = found[VICTIM], whole[VICTIM]
        assert (session.facts, session.saved) == (FACTS, expected.saved)
        assert session.events == expected.events[: len(session.events)]
        position = furthest([{"at": session.saved.position, "tokens": []}, *session.events])
        if len(session.events) < len(expected.events):
            assert position == lost[VICTIM].restored <= lost[VICTIM].position
        more = {"at": position, "tokens": [5], "learn": True}
        store.log(VICTIM, [more])
        store.release()
        store, found, lost = recovered(place)
        assert lost == {}, "it was said once"
        assert found[VICTIM].events == [*session.events, more]
    else:
        assert lost[VICTIM].restored == 0
    store.release()
    for path in (directory / "whole", place):
        shutil.rmtree(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["session.db", "session.db-wal"]), st.integers(0, 2**20), st.integers(0, 7))
def test_a_flipped_bit_costs_at_most_its_session(kept: Path, tmp_path: Path, name: str, at: int, bit: int) -> None:
    def flip(content: bytearray) -> None:
        content[at % len(content)] ^= 1 << bit

    if (kept / VICTIM / name).exists():
        check_damaged(kept, tmp_path, name, flip)


def test_names_of_tables_that_are_no_text_cost_at_most_their_session(kept: Path, tmp_path: Path) -> None:
    """SQLite quotes them in its messages."""

    def spoil(content: bytearray) -> None:
        at = content.index(b"CREATE TABLE")
        content[at - 16 : at + 12] = bytes([0x98]) * 28

    check_damaged(kept, tmp_path, "session.db", spoil)


@pytest.mark.parametrize("spoilt", [b"PRHMARY KEY", b"PRIMQRY KEY", b"PRIMARY0KEY"])
@pytest.mark.parametrize("table", [b"session", b"event"])
def test_numbers_of_rows_that_are_none_cost_at_most_their_session(
    kept: Path, tmp_path: Path, table: bytes, spoilt: bytes
) -> None:
    """A column holds the number of its row by the words PRIMARY KEY alone, and nothing without them."""

    def spoil(content: bytearray) -> None:
        at = content.index(b"PRIMARY KEY", content.index(b"CREATE TABLE " + table))
        content[at : at + len(spoilt)] = spoilt

    check_damaged(kept, tmp_path, "session.db", spoil)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["session.db", "session.db-wal"]), st.integers(0, 2**20), st.binary(min_size=1, max_size=600))
def test_what_is_written_over_costs_at_most_its_session(
    kept: Path, tmp_path: Path, name: str, at: int, noise: bytes
) -> None:
    def write_over(content: bytearray) -> None:
        here = slice(at % len(content), at % len(content) + len(noise))
        content[here] = noise[: len(content) - here.start]

    if (kept / VICTIM / name).exists():
        check_damaged(kept, tmp_path, name, write_over)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["session.db", "session.db-wal"])
def test_no_flipped_bit_is_hidden(kept: Path, tmp_path: Path, name: str) -> None:
    """One of every byte."""
    size = (kept / VICTIM / name).stat().st_size if (kept / VICTIM / name).exists() else 0
    for at in range(size):

        def flip(content: bytearray, at: int = at) -> None:
            content[at] ^= 1 << at % 7

        check_damaged(kept, tmp_path, name, flip)


def test_cuts_and_carried_texts() -> None:
    def read(at: int, tokens: list[int], **more: Any) -> dict[str, Any]:
        return {"at": at, "tokens": tokens, "learn": True} | more

    events = [read(3, [1, 2, 3, 4]), {"cut": 5}, read(5, [9]), read(5, [9], carried=True), read(6, [8])]
    assert consistent(events, 3) == (events, 7)
    assert [tokens for tokens, _ in replayed(events, 3)] == [[1, 2], [9], [8]]
    assert consistent([read(0, [1]), read(5, [2])], 0) == ([read(0, [1])], 1)
    assert consistent([read(0, [1]), {"tokens": 3}], 0) == ([read(0, [1])], 1)
    assert consistent([read(0, [True])], 0) == ([], 0)
