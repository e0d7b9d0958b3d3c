"""How long clients wait: every task once, every token once, and nothing that is read again after a crash."""

from __future__ import annotations

from pathlib import Path

from longread.engine import Engine, Sampling
from longread.engine.interface import BOUNDS
from longread.engine.jobs import LatencyHistograms
from tests.test_engine_batches import INNER, M, make, text
from tests.test_engine_files import crash, opened


def counts(engine: Engine) -> dict[str, int]:
    return {name: times.count for name, times in engine.timings().items()}


def test_every_task_waits_once_and_every_token_has_a_time() -> None:
    with Engine(make(), INNER) as engine:
        assert counts(engine) == {"waiting": 0, "first_token": 0, "next_token": 0}
        sid = engine.create().id
        engine.append(sid, text(5 * M)).result(60)
        assert counts(engine) == {"waiting": 1, "first_token": 0, "next_token": 0}
        engine.generate(sid, Sampling(max_tokens=2 * M)).result(60)
        assert counts(engine) == {"waiting": 2, "first_token": 1, "next_token": 2 * M - 1}
        engine.complete(text(9), Sampling(max_tokens=3)).result(60)
        assert counts(engine) == {"waiting": 3, "first_token": 2, "next_token": 2 * M + 1}
        waited = engine.timings()["first_token"].seconds
        assert engine.timings()["waiting"].seconds > 0
        assert 0 < waited < 120


def test_what_is_read_again_was_not_waited_for(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(5 * M)).result(60)
    crash(engine)
    with opened(tmp_path) as engine:
        engine.append(sid, text(3)).result(60)
        assert counts(engine)["waiting"] == 1


def test_buckets_hold_what_is_at_most_their_bound() -> None:
    histograms = LatencyHistograms()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] + 1):
        histograms.observe("waiting", seconds)
    found = histograms.read()["waiting"]
    assert (found.counts[0], found.counts[1], found.counts[-2], found.counts[-1]) == (2, 1, 1, 1)
    assert found.count == 5
    assert len(found.counts) == len(BOUNDS) + 1
