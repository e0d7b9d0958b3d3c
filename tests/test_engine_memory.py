"""A device without memory: what leaves a lane goes elsewhere, and one failure ends nobody else's work."""

from __future__ import annotations

import pytest
import torch

from longread.config import UserError
from longread.engine import Engine, Sampling
from longread.engine.lanes import Lanes
from tests.test_engine import read, write
from tests.test_engine_batches import INNER, make, text


def test_a_writer_that_the_device_cannot_hold_twice_goes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(make(), INNER) as plain:
        sid = plain.create().id
        read(plain, sid, text(9))
        expected = write(plain, sid) + write(plain, sid)
    state_of = Lanes.state

    def short(lanes: Lanes, job: object, device: torch.device | None = None) -> object:
        if device is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return state_of(lanes, job, device)  # type: ignore[arg-type]

    monkeypatch.setattr(Lanes, "state", short)
    with Engine(make(), INNER) as engine:
        sid = engine.create().id
        read(engine, sid, text(9))
        first = write(engine, sid)
        assert engine.info(sid).tier == "host"
        assert first + write(engine, sid) == expected


def test_lanes_that_are_lost_end_their_tasks_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(lanes: Lanes, job: object, device: object = None) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Engine(make(), INNER) as engine:
        lost, kept = engine.create().id, engine.create().id
        for sid in (lost, kept):
            read(engine, sid, text(9))
        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "state", gone)
            with pytest.raises(UserError, match="is lost at position"):
                engine.generate(lost, Sampling(max_tokens=3)).result(60)
        assert [info.id for info in engine.sessions()] == [kept]
        assert len(write(engine, kept)) == 10
    assert "lanes are given up" in caplog.text
    assert "a turn of the engine failed" not in caplog.text
