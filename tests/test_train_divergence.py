"""A run that diverges: it says so, keeps what was good, and halts; a spike is no divergence."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longread import checkpoint
from longread.config import RunConfig, TrainingHalted
from longread.data import TokenDataset
from longread.train import accumulate_gradient, train
from longread.train.divergence import FEWEST, HISTORY, DivergenceWatch
from tests.test_train import change, make_data, rows_of, weights_of, without_timing

Steps = list[tuple[float, float]]
V = 257


def judged(steps: Steps) -> list[int]:
    """Bad steps in a row after each step."""
    judge, found = DivergenceWatch(V), []
    for loss, norm in steps:
        judge.see(loss, norm)
        found.append(judge.bad_steps)
    return found


def ordinary(count: int, seed: int = 0, low: float = 1.2) -> Steps:
    """A loss that falls from ln V to `low` with noise, while the norm swells in the warm-up and then settles."""
    draw = random.Random(seed)
    return [
        (
            (low + (math.log(V) - low) * math.exp(-i / 40)) * draw.uniform(0.85, 1.15),
            (0.3 + 4 * math.exp(-(((i - 15) / 10) ** 2))) * math.exp(draw.gauss(0, 0.6)),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("low", [0.01, 1.2, 4.0])
def test_an_ordinary_run_has_no_bad_step(low: float) -> None:
    for seed in range(20):
        assert not any(judged(ordinary(400, seed, low)))


@pytest.mark.parametrize(("loss", "norm"), [(3.0, 0.3), (1.2, 40.0), (9.0, 4.5e6)])
@pytest.mark.parametrize("good", [FEWEST, 200, 3 * HISTORY])
def test_a_loss_or_a_norm_far_above_the_median_is_bad_however_long_it_lasts(
    good: int, loss: float, norm: float
) -> None:
    usual = [(1.2 + 0.01 * (i % 5), 0.3) for i in range(good)]
    assert judged([*usual, *[(loss, norm)] * 500]) == [0] * good + list(range(1, 501))


def test_a_spike_ends_the_count() -> None:
    usual, spike = (1.2, 0.3), (9.0, 50.0)
    assert judged([*[usual] * 30, spike, usual, spike, spike, usual])[-5:] == [1, 0, 1, 2, 0]


def test_it_is_free_of_scale() -> None:
    """Losses and norms in other units, below what knowing nothing costs, are judged alike."""
    steps = [*ordinary(300, low=0.5), (0.9, 100.0), *[(2.5, 0.3)] * 3, (0.5, 0.3)]
    steps = [(loss / 100, norm) for loss, norm in steps]
    found = judged(steps)
    assert judged([(10 * loss, norm / 1000) for loss, norm in steps]) == found
    assert found[-5:] == [1, 2, 3, 4, 0]


def test_before_there_is_a_history_only_a_loss_above_that_of_knowing_nothing_is_bad() -> None:
    assert judged([(5.5, 1.0), (8.0, 1e6), (8.4, 1.0), (9.0, 1.0)]) == [0, 0, 1, 2]
    # one that began with a model knows more than nothing: a pretrained one that adaptation destroys in a few steps
    judge, found = DivergenceWatch(V, [{"loss": 3.0, "grad_norm": 1.0}], knows=True), []
    for loss in (4.4, 4.6, 5.4, 3.1):
        judge.see(loss, 1.0)
        found.append(judge.bad_steps)
    assert found == [0, 1, 2, 0]
    # a run that begins far above ln V is good as long as it does not rise
    assert judged([(100.0, 1.0), (90.0, 1.0), (151.0, 1.0)]) == [0, 0, 1]


def test_the_history_is_a_function_of_the_rows() -> None:
    steps = [*ordinary(150), *[(9.0, 50.0)] * 7, *ordinary(30, low=5.0), *[(9.0, 50.0)] * 3]
    rows: list[dict[str, Any]] = [{"loss": loss, "grad_norm": norm} for loss, norm in steps]
    whole = judged(steps)
    for cut in range(0, len(steps), 7):
        judge = DivergenceWatch(V, [*rows[:cut], {"loss": None, "grad_norm": 1.0}, {}])
        for (loss, norm), expected in zip(steps[cut:], whole[cut:], strict=True):
            judge.see(loss, norm)
            assert judge.bad_steps == expected


# Runs


EXPLODES = change(
    steps=80,
    optimizer__decay_steps=80,
    optimizer__lr=10.0,
    optimizer__warmup_steps=72,
    optimizer__weight_decay=0.0,
    evaluate_every=None,
    checkpoint_every=5,
    max_bad_steps=12,
)
"""Learns while the rate is small, and explodes when it has climbed."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


def halted(config: RunConfig, data: TokenDataset, run: Path, **options: Any) -> tuple[TrainingHalted, list[str]]:
    """How a run halts, and its warnings of divergence."""
    with warnings.catch_warnings(record=True, action="always") as said, pytest.raises(TrainingHalted) as found:
        train(config, data, run, **options)
    return found.value, [str(w.message) for w in said if "diverges" in str(w.message)]


@pytest.fixture(scope="module")
def exploded(data: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingHalted, list[str]]:
    """The run that halts, how it does, and its warnings of divergence."""
    run = tmp_path_factory.mktemp("exploded") / "run"
    return run, *halted(EXPLODES, data, run)


@pytest.fixture(scope="module")
def ended(data: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The same run without the rule, at its end, and all its warnings."""
    run = tmp_path_factory.mktemp("ended") / "run"
    with warnings.catch_warnings(record=True, action="always") as said:
        result = train(change(EXPLODES, max_bad_steps=None), data, run)
    assert result.step == 80
    return run, [str(w.message) for w in said]


def streaks(rows: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Steps of each unbroken run of bad ones."""
    for bad, group in itertools.groupby(rows, key=lambda row: "bad_steps" in row):
        if bad:
            yield [row["step"] for row in group]


def test_a_diverging_run_halts_and_keeps_what_was_good(exploded: tuple[Path, TrainingHalted, list[str]]) -> None:
    run, error, said = exploded
    rows = rows_of(run)
    *_, last = streaks(rows)
    assert len(last) == rows[-1]["bad_steps"] == 12
    assert error.exit_status == 3
    assert f"training halted at step {last[-1]}: it diverges since step {last[0]}: loss" in str(error)
    assert "a lower optimizer.lr (it is 10)" in str(error)
    assert len([line for line in said if f"since step {last[0]}:" in line]) == 1
    assert said == [line for line in said if "halts at 12 such steps in a row" in line]
    assert not (run / "model").exists()
    saved = sorted((run / "checkpoints").iterdir())
    assert [checkpoint.read_checkpoint(path).step for path in saved][-1] < last[0]
    good = next(path for path in reversed(saved) if str(path) in str(error))
    bad_steps = {step for streak in streaks(rows) for step in streak}
    assert checkpoint.read_checkpoint(good).step + 1 not in bad_steps
    assert checkpoint.load_model(good).model.config == EXPLODES.model


def test_without_the_rule_the_same_run_goes_to_its_end(ended: tuple[Path, list[str]]) -> None:
    run, messages = ended
    rows = rows_of(run)
    *_, last = bad = list(streaks(rows))  # it may have come to itself in between: how often is a matter of rounding
    assert max(map(len, bad)) >= 12
    assert (len(last), last[-1]) == (rows[-1]["bad_steps"], 80)
    first = last[0]
    assert any(f"since step {first}" in m and "it goes on, as max_bad_steps is none" in m for m in messages)
    assert any("the checkpoint of step 80 is of weights that diverge; the last good one, " in m for m in messages)
    kept = {checkpoint.read_checkpoint(path).step for path in (run / "checkpoints").iterdir()}
    assert {75, 80} < kept
    assert len(kept) == 3
    assert min(kept) < first  # two newer ones have not pushed it out


@pytest.mark.parametrize("within", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_run_that_is_stopped_while_it_diverges_goes_on_to_the_same_end(
    tmp_path: Path, data: TokenDataset, exploded: tuple[Path, TrainingHalted, list[str]], within: int
) -> None:
    whole, expected, _ = exploded
    rows = rows_of(whole)
    stop = rows[-1]["step"] - 12 + within

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == stop:
            signal.raise_signal(signal.SIGTERM)

    with warnings.catch_warnings(action="ignore"):
        result = train(EXPLODES, data, tmp_path / "run", on_step=interrupt)
    assert result.interrupted
    saved = 0  # a checkpoint that falls on bad weights waits for good ones
    for row in rows[:stop]:
        if "bad_steps" not in row and row["step"] // 5 > saved // 5:
            saved = row["step"]
    assert (result.step, result.saved_step) == (stop, saved)
    error, _ = halted(EXPLODES, data, tmp_path / "run", resume=True)
    assert str(error).replace(str(tmp_path / "run"), str(whole)) == str(expected)
    assert without_timing(rows_of(tmp_path / "run")) == without_timing(rows)


def test_when_to_halt_may_change_on_resume_and_does_not_change_the_run(
    tmp_path: Path,
    data: TokenDataset,
    exploded: tuple[Path, TrainingHalted, list[str]],
    ended: tuple[Path, list[str]],
) -> None:
    run = shutil.copytree(exploded[0], tmp_path / "run")
    with warnings.catch_warnings(action="ignore"):
        train(change(EXPLODES, max_bad_steps=None), data, run, resume=True)
    assert weights_of(run) == weights_of(ended[0])
    assert without_timing(rows_of(run)) == without_timing(rows_of(ended[0]))


def test_a_run_of_before_there_was_a_rule_goes_on(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stored config and state do not know the fields."""
    whole = change(steps=4)
    train(change(steps=2), data, tmp_path / "run")
    real = checkpoint.read_checkpoint

    def older(path: Path, *divided: Any) -> Any:
        found = real(path, *divided)
        found.state["config"].pop("max_bad_steps")
        found.state.pop("last_good")
        return found

    monkeypatch.setattr(checkpoint, "read_checkpoint", older)
    train(whole, data, tmp_path / "run", resume=True)
    train(whole, data, tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_a_lower_limit_holds_for_steps_that_were_bad_before(
    tmp_path: Path, data: TokenDataset, ended: tuple[Path, list[str]]
) -> None:
    run = shutil.copytree(ended[0], tmp_path / "run")
    before = rows_of(run)[-1]["bad_steps"]
    assert before > 3
    error, _ = halted(change(EXPLODES, max_bad_steps=3, steps=82), data, run, resume=True)
    assert f"it diverges since step {80 - before + 1}" in str(error)


def test_a_checkpoint_that_falls_on_a_spike_is_written_after_it(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = accumulate_gradient, itertools.count(1)

    def spiked(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        return found._replace(loss=found.loss + 100.0) if next(calls) == 4 else found

    monkeypatch.setattr("longread.train.outer_step.accumulate_gradient", spiked)
    written: list[int] = []

    def watch(row: dict[str, Any]) -> None:
        newest = checkpoint.newest_checkpoint(tmp_path / "run")
        written.append(0 if newest is None else checkpoint.read_checkpoint(newest).step)

    train(change(steps=8, checkpoint_every=4), data, tmp_path / "run", on_step=watch)
    assert written == [0, 0, 0, 0, 5, 5, 5, 8]
    assert [row.get("bad_steps") for row in rows_of(tmp_path / "run")] == [None, None, None, 1, None, None, None, None]
