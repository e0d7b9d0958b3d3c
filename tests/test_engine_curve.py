"""Losses that stay with a session: bounded, the means that a direct count gives, and there after whatever happens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longread.engine import Curve, Engine, Sampling
from longread.engine.curve import MOST_BINS
from longread.server.sessions.losses import kept
from longread.session import Session
from tests.journals import as_journals
from tests.test_engine import read, write
from tests.test_engine_batches import INNER, M, make, text
from tests.test_engine_files import crash


def losses(n: int, seed: int = 0) -> list[float]:
    return [1 + math.sin(seed + 0.37 * i) for i in range(n)]


@pytest.mark.parametrize("first", [0, 1, 37, 1023])
@pytest.mark.parametrize("pieces", [[1], [511, 1, 1], [5000], [1] * 1500, [7, 300, 1, 2048, 9, 4000, 3]])
def test_bins_hold_the_means_of_their_tokens(first: int, pieces: list[int]) -> None:
    curve, seen = Curve.beginning(first), []
    for i, count in enumerate(pieces):
        if i % 3 == 2:
            curve.add_written(count)
            seen += [None] * count
        else:
            curve.add(new := losses(count, i))
            seen += new
    bins = list(curve.bins())
    assert len(bins) <= MOST_BINS
    assert len(bins) > MOST_BINS // 2 or curve.width == 1
    assert [start for start, *_ in bins] == [first, *(start + tokens for start, tokens, *_ in bins[:-1])]
    assert bins[-1][0] + bins[-1][1] == first + sum(pieces) == curve.end
    for start, tokens, mean, scored, written in bins:
        assert start == first or start % curve.width == 0
        own = [x for x in seen[start - first : start - first + tokens] if x is not None]
        assert (scored, written) == (len(own), tokens - len(own))
        assert mean == (pytest.approx(sum(own) / len(own)) if own else None)


def test_the_same_tokens_in_other_pieces_are_the_same_curve() -> None:
    one, other = Curve(), Curve()
    one.add(losses(3000))
    for i in range(0, 3000, 13):
        other.add(losses(3000)[i : i + 13])
    assert [(b[0], b[3], b[4]) for b in one.bins()] == [(b[0], b[3], b[4]) for b in other.bins()]
    assert [b[2] for b in one.bins()] == pytest.approx([b[2] for b in other.bins()])


def test_what_ends_with_its_task_keeps_no_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(make(), INNER) as engine:
        sid = engine.create().id
        read(engine, sid, text(2 * M))
        before = engine.losses(sid)
        monkeypatch.delattr(Curve, "_places")  # to add losses would fail
        assert engine.complete(text(9), Sampling(max_tokens=3)).result(60).reason == "length"
        assert len(engine.score(sid, text(2 * M)).result(60).nll) == 2 * M
        assert engine.losses(sid) == before


def test_what_is_no_number_has_no_loss() -> None:
    curve = Curve()
    curve.add([math.nan, 2.0, math.inf, 3.0])
    assert [mean for _, _, mean, _, _ in curve.copy(4).bins()] == [2.5]
    assert [mean for _, _, mean, _, _ in curve.bins()] == [None, 2.0, None, 3.0]


def test_curves_are_kept_as_json_and_refuse_what_is_none() -> None:
    curve = Curve.beginning(9)
    curve.add(losses(1000))
    values = json.loads(json.dumps(curve.as_json()))
    assert Curve.from_json(values) == curve
    for wrong in ({"width": None}, {"sums": [1.0]}, {"scored": ["x"]}, {"end": "much"}):
        with pytest.raises((TypeError, ValueError)):
            Curve.from_json(values | wrong)


def test_a_twin_that_is_behind_is_shown_as_far_as_it_is() -> None:
    own, frozen = Curve(), Curve()
    own.add(losses(600))
    frozen.add([x + 1 for x in losses(300)])
    shown = kept(own, frozen)
    assert shown["start"] == list(range(0, 600, 2))
    assert shown["nll"] is not None
    assert shown["frozen_nll"] is not None
    assert [b - a for a, b in zip(shown["nll"][:150], shown["frozen_nll"], strict=False)] == pytest.approx([1.0] * 150)
    assert shown["frozen_nll"][150:] == [None] * 150
    assert kept(own, None)["frozen_nll"] is None
    assert kept(Curve(), None)["start"] == []


@pytest.mark.parametrize("end", [Engine.close, crash], ids=["closed", "killed"])
def test_an_engine_keeps_them(end: object, tmp_path: Path) -> None:
    model, session = make(), Session(make(), INNER)
    engine = Engine(model, INNER, directory=tmp_path)
    sid = engine.create().id
    read(engine, sid, text(5 * M))
    engine.save(sid)
    fork = engine.fork(sid).id
    written = write(engine, sid, 6)
    read(engine, sid, text(M, 1))
    expected = Curve()
    expected.add(session.read(text(5 * M)).tolist())
    list(session.generate(6, seed=1))
    assert [b[2] for b in engine.losses(fork).bins()] == pytest.approx([b[2] for b in expected.bins()])
    expected.add_written(len(written))
    expected.add(session.read(text(M, 1)).tolist())
    before = engine.losses(sid)
    assert [b[2:] for b in before.bins()] == [pytest.approx(b[2:]) for b in expected.bins()]
    copy = engine.restore(engine.export(fork)).id
    assert (engine.losses(copy).first, list(engine.losses(copy).bins())) == (5 * M, [])
    read(engine, copy, text(3))
    assert [b[0] for b in engine.losses(copy).bins()] == [5 * M, 5 * M + 1, 5 * M + 2]
    end(engine)  # type: ignore[operator]
    with Engine(model, INNER, directory=tmp_path) as engine:
        for session_id in (sid, fork, copy):
            read(engine, session_id, text(1))
        after = engine.losses(sid)
        assert [b[3:] for b in after.bins()][:-1] == [b[3:] for b in before.bins()]
        assert list(after.sums)[:-1] == pytest.approx(list(before.sums))
        assert engine.losses(fork).end == 5 * M + 1
        assert engine.losses(copy).first == 5 * M


def test_sessions_of_an_earlier_version_begin_where_they_are(tmp_path: Path) -> None:
    with Engine(make(), INNER, directory=tmp_path) as engine:
        sid = engine.create().id
        read(engine, sid, text(9))
        engine.save(sid)
    as_journals(tmp_path)
    file = tmp_path / "sessions" / sid / "session.json"
    values = json.loads(file.read_text())
    del values["saved"]["losses"]
    file.write_text(json.dumps(values))
    with Engine(make(), INNER, directory=tmp_path) as engine:
        read(engine, sid, text(2))
        assert [b[0] for b in engine.losses(sid).bins()] == [9, 10]
