"""Damaged, hostile and foreign files of an engine: what is lost is said, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from longread.config import UserError
from longread.engine import Engine
from longread.engine.journal import DamagedJournal, add_events, read_events
from longread.engine.keeping import replayed
from longread.engine.store import consistent
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


@pytest.mark.parametrize("how", [*DAMAGE, "path traversal", "pickle"])
def test_damaged_snapshots_are_reported_and_others_go_on(how: str, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    broken, good = engine.create("ann").id, engine.create().id
    for sid in (broken, good):
        engine.append(sid, text(30)).result()
    path = engine.save(broken)
    engine.append(broken, text(3)).result()
    crash(engine)
    damage(how, path)
    engine = opened(tmp_path)
    if not engine.lost:  # found when it is wanted, by then at the latest
        with pytest.raises(UserError, match=r"is lost at position 33|there is no session"):
            engine.append(broken, text(5)).result()
    (lost,) = engine.lost
    assert (lost.id, lost.owner, lost.position, lost.restored) == (broken, "ann", 33, 0)
    assert [info.id for info in engine.sessions()] == [good]
    assert write(engine, good) == reread(engine, text(30))
    engine.close()
    assert opened(tmp_path).lost == []  # it was said once, and the files are kept aside
    assert (tmp_path / "sessions" / f"{broken}.lost").is_dir()


@pytest.mark.parametrize("how", ["half", "empty", "flipped", "gone"])
def test_damaged_facts_are_reported(how: str, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(30)).result()
    crash(engine)
    damage(how, tmp_path / "sessions" / sid / "session.json")
    engine = opened(tmp_path)
    if how == "flipped":  # within the text of a number, perhaps: it need not matter
        assert len(engine.sessions()) + len(engine.lost) == 1
    elif how == "gone":  # as if it had been deleted
        assert (engine.sessions(), engine.lost) == ([], [])
    else:
        assert [(lost.id, lost.position) for lost in engine.lost] == [(sid, 30)]
    engine.close()


def test_a_damaged_journal_is_restored_up_to_the_damage(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    for seed in range(3):
        engine.append(sid, text(10, seed)).result()
    crash(engine)
    (journal,) = files(tmp_path, "journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1].replace(b"[", b"(") + lines[2])
    engine = opened(tmp_path)
    (lost,) = engine.lost
    assert (lost.id, lost.position, lost.restored) == (sid, 30, 10)
    assert engine.append(sid, text(10, 5)).result().position == 20
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert write(engine, sid) == reread(engine, text(10), text(10, 5))
    engine.close()


def test_what_was_never_acknowledged_may_be_missing(tmp_path: Path) -> None:
    """The last line of a journal, cut off by a crash while it was written."""
    engine = opened(tmp_path)
    sid = engine.create().id
    for seed in range(2):
        engine.append(sid, text(10, seed)).result()
    crash(engine)
    (journal,) = files(tmp_path, "journal")
    journal.write_bytes(journal.read_bytes()[:-5])
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6), st.integers(0, 400), st.binary(max_size=6))
def test_a_journal_gives_what_was_written_or_says_so(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], at: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    events = [{"at": 0, "tokens": tokens} for tokens in texts]
    for event in events:
        add_events(path, [event])
    assert read_events(path) == events
    if events:
        data = path.read_bytes()
        at = min(at, len(data))
        path.write_bytes(data[:at] + noise + data[at + len(noise) :])
        try:
            found = read_events(path)
        except DamagedJournal as error:
            found = error.events
        assert found == events[: len(found)]


def test_cuts_and_carried_texts() -> None:
    def read(at: int, tokens: list[int], **more: Any) -> dict[str, Any]:
        return {"at": at, "tokens": tokens, "learn": True} | more

    events = [read(3, [1, 2, 3, 4]), {"cut": 5}, read(5, [9]), read(5, [9], carried=True), read(6, [8])]
    assert consistent(events, 3) == (events, 7)
    assert [tokens for tokens, _ in replayed(events, 3)] == [[1, 2], [9], [8]]
    assert consistent([read(0, [1]), read(5, [2])], 0) == ([read(0, [1])], 1)
    assert consistent([read(0, [1]), {"tokens": 3}], 0) == ([read(0, [1])], 1)
    assert consistent([read(0, [True])], 0) == ([], 0)
