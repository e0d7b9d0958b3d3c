"""`longread train` as a user meets it: what it refuses, warns of, and how it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from longread.cli import main
from tests.test_cli import MICROSCOPIC, SENTENCES, fails


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and a data set."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(SENTENCES)
    assert main(["prepare", str(home / "text.txt"), "--out", str(home / "data")]) == 0
    return home


def test_an_interrupted_training_goes_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(a) for a in ["train", "toy", "--data", home / "data", "--out", tmp_path / "run", *MICROSCOPIC]]
    assert main(arguments) == 0
    assert "already holds a run; resume it" in fails(capsys, *arguments)
    assert main([*arguments, "--resume"]) == 0
    more = [*arguments[:5], str(tmp_path / "more"), *arguments[6:]]
    assert main([*more, "--init", str(tmp_path / "run")]) == 0
    assert main([*more, "--init", str(tmp_path / "run"), "--resume"]) == 0
    assert main([*more, "--resume"]) == 0
    assert main([*arguments[:5], str(tmp_path / "other"), *arguments[6:], "--set", "seed=1"]) == 0
    assert f"began with the weights of {tmp_path / 'run'}" in fails(
        capsys, *more, "--init", tmp_path / "other", "--resume"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["toy2"], "no recipe 'toy2'; choose one of toy, small, small-extend, 125m"),
        (["toy", "--method", "rnn"], "no method 'rnn'"),
        (["toy", "--context-length", "100"], "100 is not a multiple of mini_batch_size 32; use 96 or 128"),
        (["toy", "--set", "inner.lr=nan"], "lr is nan; it must be a finite number"),
        (["toy", "--set", "inner.clip=-1"], "clip is -1; it must be positive"),
        (["toy", "--set", "optimizer.lr=-0.1"], "lr is -0.1; it must be positive"),
        (
            ["toy", "--set", "model.depth=3"],
            "--set model.depth: there is no such field; there are name, model.vocab_size",
        ),
        (["toy", "--set", "model=3"], "no such field"),
        (["toy", "--set", "steps"], "has no value"),
        (["toy", "--set", "steps=many"], "steps is 'many'; it must be a whole number"),
        (["toy", "--set", "model.vocab_size=100"], "vocab_size 100, but the data has 257"),
        (["toy", "--device", "cuda:99"], "device cuda:99 cannot be used"),
        (["toy", "--seed", str(2**63)], "seed is 9223372036854775808; it must be below 2^63"),
    ],
)
def test_training_that_cannot_begin(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert reason in fails(capsys, "train", *arguments, "--data", home / "data", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_directory_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out is empty; name a directory" in fails(capsys, "train", "toy", "--data", home / "data", "--out", "")


def test_memory_that_runs_out(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NumPy says it, a GPU, and a CPU."""
    arguments = "train", "toy", "--data", home / "data", *MICROSCOPIC
    for error in (
        MemoryError("Unable to allocate 3.81 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ):
        monkeypatch.setattr("longread.train.run.fit", mock.Mock(side_effect=error))
        assert "error: out of memory: a smaller batch (train: --set micro_batch_size=N)" in fails(
            capsys, *arguments, "--out", tmp_path / "run"
        )
    monkeypatch.setattr("longread.train.run.fit", mock.Mock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        main([str(argument) for argument in (*arguments, "--out", tmp_path / "run")])


def test_a_rate_that_decays_over_other_steps(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "toy", "--data", str(home / "data"), *MICROSCOPIC, "--out", str(tmp_path / "run")]
    assert main([*arguments, "--set", "steps=2"]) == 0
    assert "warning: there are 2 steps, and the rate decays over 3; --set optimizer.decay_steps too" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--resume"]) == 0
    assert "decays" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_that_is_stopped_says_so_in_its_status(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    arguments = ["train", "toy", "--data", str(home / "data"), *MICROSCOPIC, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("longread.train.Progress.__call__", lambda *_: os.kill(os.getpid(), number))
        assert main(arguments) == status
    assert "stopped after step 1 of 3; --resume goes on from there" in capsys.readouterr().out
    assert main([*arguments, "--resume"]) == 0


def test_an_extension_without_a_model_to_extend(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "warning: small-extend goes on with a trained model: without --init it begins with none"
    arguments = [
        "train",
        "small-extend",
        "--data",
        str(home / "data"),
        *MICROSCOPIC,
        "--context-length",
        "128",
        "--out",
    ]
    assert main([*arguments, str(tmp_path / "new")]) == 0
    assert said in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "longer"), "--init", str(tmp_path / "new")]) == 0
    assert said not in capsys.readouterr().err
