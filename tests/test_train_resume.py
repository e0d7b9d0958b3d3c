"""How a run goes on after it ended, was stopped, or failed; test_resume.py kills it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longread import checkpoint, files
from longread.config import UserError
from longread.data import TokenDataset
from longread.outer_loop import Fit
from longread.train import train, validation
from longread.train.captured import CapturedGradient
from longread.train.stopping import StopSignal
from tests.test_train import CONFIG, MODEL, change, make_data, rows_of, weights_of, without_timing


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed, which no test changes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(CONFIG, data, run, validation=data.validation)
    return run


def test_a_finished_run_has_nothing_left_and_a_longer_one_goes_on(tmp_path: Path, data: TokenDataset) -> None:
    train(CONFIG, data, tmp_path / "short")
    before = weights_of(tmp_path / "short")
    result = train(CONFIG, data, tmp_path / "short", resume=True)
    assert result.row is None
    assert weights_of(tmp_path / "short") == before
    longer = change(steps=9)
    train(longer, data, tmp_path / "short", resume=True)
    train(longer, data, tmp_path / "long")
    assert weights_of(tmp_path / "short") == weights_of(tmp_path / "long")
    assert without_timing(rows_of(tmp_path / "short")) == without_timing(rows_of(tmp_path / "long"))
    run = files.read_json(tmp_path / "short" / "run.json", kind="run")
    assert [start["step"] for start in run["resumed"]] == [6, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    tmp_path: Path, data: TokenDataset, whole: Path, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)  # as `timeout` does

    result = train(change(checkpoint_every=None), data, tmp_path / "run", on_step=interrupt)
    assert signal.getsignal(number) is handler
    assert result.interrupted
    assert not (tmp_path / "run" / "model").exists()
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert checkpoint.read_checkpoint(newest).step == result.step == 2
    train(change(checkpoint_every=None), data, tmp_path / "run", resume=True)
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_a_second_interrupt_aborts_at_once(tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longread.signals.ECHO", 0.0)

    def interrupt(row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(change(checkpoint_every=None), data, tmp_path / "run", on_step=interrupt)
    assert checkpoint.newest_checkpoint(tmp_path / "run") is None


def test_a_damaged_newest_checkpoint_costs_only_the_steps_after_the_older_one(
    tmp_path: Path, data: TokenDataset
) -> None:
    train(CONFIG, data, tmp_path / "run")
    before, rows = weights_of(tmp_path / "run"), rows_of(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"optimizer\.safetensors is truncated.*going back to step-00000004"):
        train(CONFIG, data, tmp_path / "run", resume=True)
    assert weights_of(tmp_path / "run") == before
    assert without_timing(rows_of(tmp_path / "run")) == without_timing(rows)


def test_an_older_run_that_had_not_settled_what_to_recompute_settles_it(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored() -> Any:
        return json.loads((max((tmp_path / "run" / "checkpoints").iterdir()) / "state.json").read_text())

    with monkeypatch.context() as older:
        older.setattr("longread.train.settling.fit", lambda *args, **options: Fit(4, "auto", 0))
        older.setattr("longread.train.outer_step.Throughput.fields", lambda *args: {"seconds": 1.0})
        train(change(loss="static"), data, tmp_path / "run")
    assert stored()["recompute"] == "auto"
    train(change(loss="static", steps=8), data, tmp_path / "run", resume=True)
    assert stored()["recompute"] == "none"
    assert stored()["tokens"] == rows_of(tmp_path / "run")[-1]["tokens"]


def test_how_a_gradient_is_summed_may_change_on_resume(tmp_path: Path, data: TokenDataset, whole: Path) -> None:
    train(change(steps=4), data, tmp_path / "run")
    changed = change(recompute="sqrt", micro_batch_size=2)
    with (
        pytest.warns(UserWarning, match="recompute was 'none' and is 'sqrt' from now on; sums round differently"),
        pytest.warns(UserWarning, match="micro_batch_size was 4 and is 2 from now on"),
    ):
        train(changed, data, tmp_path / "run", resume=True)
    state = checkpoint.read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006").state
    assert (state["recompute"], state["micro_batch_size"]) == ("sqrt", 2)
    for name, weights in load_file(whole / "model" / "model.safetensors").items():
        found = load_file(tmp_path / "run" / "model" / "model.safetensors")[name]
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
    assert train(changed, data, tmp_path / "run", resume=True).row is None  # without a warning


def test_what_a_run_settled_on_stays_when_memory_changes(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr("longread.train.settling.fit", lambda *args, **options: Fit(2, "sqrt", 0))
        train(change(steps=4), data, tmp_path / "run")
    train(CONFIG, data, tmp_path / "run", resume=True)
    state = checkpoint.read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006").state
    assert (state["recompute"], state["micro_batch_size"]) == ("sqrt", 2)


def test_a_failing_validation_costs_no_step(
    tmp_path: Path, data: TokenDataset, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> dict[str, float]:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr("longread.train.run.validation_losses", fails)
        with pytest.raises(MemoryError):
            train(CONFIG, data, tmp_path / "run", validation=data.validation)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]
    train(CONFIG, data, tmp_path / "run", validation=data.validation, resume=True)
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_a_signal_does_not_wait_for_a_validation(
    tmp_path: Path, data: TokenDataset, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may read for minutes. The step before it is kept, and a run that goes on is as one that was never stopped."""
    parts = itertools.count()

    def interrupted(*args: Any, real: Any = validation._mini_batch_losses, **options: Any) -> torch.Tensor:
        if next(parts) == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "_mini_batch_losses", interrupted)
        result = train(CONFIG, data, tmp_path / "run", validation=data.validation)
    assert next(parts) == 2
    assert (result.interrupted, result.signal) == (True, signal.SIGTERM)
    last = rows_of(tmp_path / "run")[-1]
    assert last["step"] == result.saved_step == result.step
    assert "validation_loss" not in last
    train(CONFIG, data, tmp_path / "run", validation=data.validation, resume=True)
    assert weights_of(tmp_path / "run") == weights_of(whole)


def test_what_is_ignored_stays_ignored(tmp_path: Path, data: TokenDataset) -> None:
    """SIGHUP under nohup."""

    def hang_up(row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not train(CONFIG, data, tmp_path / "run", on_step=hang_up).interrupted
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_waiting_for_a_device_ends_with_a_signal() -> None:
    """The handler runs while the work that is waited for has not ended."""
    asked = itertools.count()

    def done() -> bool:
        if next(asked) == 3:
            signal.raise_signal(signal.SIGTERM)
        return False

    with StopSignal() as stop:
        assert stop.comes_before(done)
        assert stop.number == signal.SIGTERM
    with StopSignal() as stop:
        assert not stop.comes_before(lambda: next(asked) > 8)


@pytest.mark.gpu
def test_a_signal_in_the_middle_of_a_captured_step_leaves_the_step(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint is of the step before, and is written while the device still computes."""
    gradients, saved, last = itertools.count(1), [], {}

    def interrupted(gradient: Any, *args: Any, real: Any = CapturedGradient.__call__, **options: Any) -> Any:
        if next(gradients) == 3:
            torch.cuda._sleep(10**10)  # cycles: seconds, in which nothing behind it on this stream ends
            ended.record()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(gradient, *args, **options)

    def write(*args: Any, real: Any = checkpoint.write_checkpoint, **options: Any) -> Path:
        path = real(*args, **options)
        saved.append(ended.query())
        return path

    def keep(row: dict[str, Any]) -> None:
        last["step"] = row["step"]

    ended = torch.cuda.Event()
    monkeypatch.setattr(CapturedGradient, "__call__", interrupted)
    monkeypatch.setattr("longread.checkpoint.saving.write_checkpoint", write)
    config = change(checkpoint_every=None)
    result = train(config, data, tmp_path / "run", device="cuda", on_step=keep)
    assert (result.signal, result.step, result.saved_step, last["step"]) == (signal.SIGTERM, 2, 2, 2)
    assert saved == [False]
    assert "SIGTERM: saving a checkpoint, then ending" in caplog.text
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    found = checkpoint.read_checkpoint(newest)
    assert found.step == 2
    torch.cuda.synchronize()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(found.model[name], tensor.cpu())
    monkeypatch.undo()
    assert train(config, data, tmp_path / "run", device="cuda", resume=True).step == config.steps


def test_the_clock_makes_checkpoints_where_the_config_does_not(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_of_newest(row: dict[str, Any]) -> None:
        newest = checkpoint.newest_checkpoint(tmp_path / "run")
        steps.append(None if newest is None else checkpoint.read_checkpoint(newest).step)

    steps: list[int | None] = []
    ticks = itertools.count()
    monkeypatch.setattr("longread.train.run.time.monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr("longread.train.run.LONGEST_UNSAVED", 8.0)
    train(change(checkpoint_every=None), data, tmp_path / "run", on_step=step_of_newest)
    assert steps[0] is None
    assert steps[-1] == 6
    assert any(step not in (None, 6) for step in steps)


def test_another_config_is_refused_before_the_first_checkpoint_too(tmp_path: Path, data: TokenDataset) -> None:
    def killed(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    config = change(checkpoint_every=None)
    with pytest.raises(KeyboardInterrupt):
        train(config, data, tmp_path / "run", on_step=killed)
    with pytest.raises(UserError, match="seed was 0 when this run began and is 7 now"):
        train(change(config, seed=7), data, tmp_path / "run", resume=True)


def test_a_parameter_that_never_had_a_gradient_does_not_keep_a_run_from_going_on(
    tmp_path: Path, data: TokenDataset
) -> None:
    model = dataclasses.replace(MODEL, num_suffix_blocks=0, mixer="ttt_kvb", mini_batch_size=32, window_size=32)
    config = dataclasses.replace(CONFIG, model=model, loss="static", steps=2)
    train(config, data, tmp_path / "run")
    result = train(change(config, steps=3), data, tmp_path / "run", resume=True)
    assert result.step == 3


def test_a_run_belongs_to_one_process(tmp_path: Path, data: TokenDataset) -> None:
    def second(row: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"run is in use by another process; wait for its end, or stop it"):
            train(CONFIG, data, tmp_path / "run", resume=True)

    train(CONFIG, data, tmp_path / "run", on_step=second)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_lost_metrics_do_not_keep_a_run_from_going_on(tmp_path: Path, data: TokenDataset) -> None:
    train(CONFIG, data, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="lacks rows from before step 6"):
        train(change(steps=7), data, tmp_path / "run", resume=True)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [7]


def test_resuming_where_nothing_is_begins(tmp_path: Path, data: TokenDataset) -> None:
    with pytest.warns(UserWarning, match="a has no checkpoint: training begins at the first step"):
        train(CONFIG, data, tmp_path / "a", resume=True)
    train(CONFIG, data, tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
