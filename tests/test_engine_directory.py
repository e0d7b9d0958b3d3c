"""Whose a directory is: one engine's at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from longread.config import UserError
from longread.engine import Engine, Limits
from tests.test_engine_batches import INNER, make
from tests.test_engine_files import crash, opened


def test_a_directory_belongs_to_one_engine(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    with pytest.raises(UserError, match="is in use by another server; stop that one"):
        opened(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is in use"):
        opened(tmp_path / "other")
    sid = engine.create().id
    engine.close()
    with opened(tmp_path) as engine:
        assert [info.id for info in engine.sessions()] == [sid]


def test_an_engine_that_could_not_start_leaves_its_directory_to_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device_bytes is 1"):
        Engine(make(), INNER, directory=tmp_path, limits=Limits(device_bytes=1))
    opened(tmp_path).close()


def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep sessions in .*file/sessions: .*; give another directory"):
        opened(tmp_path / "file")


def test_the_end_of_a_process_unlocks_its_directory(tmp_path: Path) -> None:
    """In one process as `crash` plays it; tests/test_server_process.py kills a real one."""
    engine = opened(tmp_path)
    sid = engine.create().id
    crash(engine)
    with opened(tmp_path) as engine:
        assert engine.info(sid).position == 0
