"""What a long reading says on its way, by a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from longread.cli.reading.pieces import Inputs, next_cut
from longread.cli.reading.progress import IN_LOG, ReadingProgress
from longread.cli.reading.readers import add_drift, packed, unpack_into
from longread.cli.reading.session_file import EVERY, Autosave
from longread.config import ModelConfig
from longread.evaluate import Divergence, InnerSteps, Measurement, PositionLoss, bin_edges
from longread.session import Session
from tests.tiny import INNER, make, text

SIZE = 1_000_000


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def measurement() -> Measurement:
    return Measurement("model", True, [PositionLoss(bin_edges())], InnerSteps(1.0))


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    (tmp_path / "text").write_bytes(b"x" * SIZE)
    inputs = Inputs([str(tmp_path / "text")])
    for strings in inputs:
        for _ in strings:
            pass
    return inputs


def test_an_estimate_and_then_a_line_now_and_then(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = ReadingProgress(inputs, quiet=False, clock=clock)
    share = 0.1
    for _ in range(70):
        progress.add(500, share, 1234, [measurement()])
        clock.now, share = clock.now + 1, share + 0.001
    estimate, *lines = capsys.readouterr().err.splitlines()
    assert estimate == "reading takes about 15 min more, at 500 tokens/s"
    assert len(lines) == 69 // IN_LOG
    assert lines[0] == "13 %, 1,234 tokens, 500 tokens/s, 14 min left"


def test_quiet_is_quiet(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = ReadingProgress(inputs, quiet=True, clock=clock)
    for i in range(5):
        progress.add(500, i / 100, 1234, [measurement()])
        clock.now += 40
    assert capsys.readouterr() == ("", "")


def test_saving_takes_turns_by_the_clock_and_a_small_share_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_session_files import prefix_at

    clock, session = Clock(), Session(make(), INNER)
    session.read(text(9))
    session.text = prefix_at(9)
    saving = Autosave(str(tmp_path / "s"), clock=clock)
    assert saving.is_due
    saving.save(session)
    assert saving.saved == session.text
    clock.now += EVERY - 1
    assert not saving.is_due
    clock.now += 2
    assert saving.is_due
    save = Session.save

    def slow(session: Session, path: str) -> None:
        save(session, path)
        clock.now += 5

    monkeypatch.setattr(Session, "save", slow)
    session.read(text(1))
    session.text = prefix_at(10)
    saving.save(session)
    clock.now += 240
    assert not saving.is_due
    clock.now += 20
    assert saving.is_due


def test_figures_have_one_width_and_come_back() -> None:
    import numpy as np

    one, other = measurement(), measurement()
    one.losses[0].add(np.linspace(1, 2, 300), np.ones(300, dtype=int))
    one.inner_steps.add(np.array([0.5, 2.0]))
    one.tokens, one.seconds, one.diverged = 300, 1.5, [Divergence("the text", 7, None)]
    for position in range(64, 2000, 64):
        add_drift(one, position, position / 1000)
    assert list(one.drift) == [64, 128, 256, 512, 1024, 1984]
    assert len(packed(one)) == len(packed(other))
    assert unpack_into(other, packed(one), "the text")
    assert packed(other) == packed(one)
    assert (other.drift, other.diverged, other.seconds) == (one.drift, one.diverged, 1.5)
    for wrong in ("", "no base64", packed(one)[:-4], "AAAA"):
        assert not unpack_into(measurement(), wrong, "the text")


def test_pieces_end_where_the_position_says() -> None:
    config = ModelConfig(
        vocab_size=257, width=16, num_blocks=2, num_heads=2, mlp_hidden=24, mini_batch_size=8, window_size=16
    )
    cuts = [next_cut(position, config, "cpu") for position in (0, 7, 8, 100, 1000, 1024, 1025, 5000)]
    assert cuts == [8, 8, 16, 128, 1024, 2048, 2048, 5120]
    assert next_cut(100, config, "cuda") == 128
    large = ModelConfig(
        vocab_size=257, width=512, num_blocks=8, num_heads=8, mlp_hidden=2048, mini_batch_size=1024, window_size=1024
    )
    assert [next_cut(position, large, "cpu") for position in (0, 1023, 1024, 3000)] == [1024, 1024, 2048, 3072]
