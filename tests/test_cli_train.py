"""`longread train` as a user meets it: what it refuses, warns of, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from longread import files
from longread.cli import main
from longread.config import RunConfig, UserError
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
        (
            ["toy", "--context-length", "100"],
            "context_length 100 is not a multiple of model.mini_batch_size 32; use 96 or 128",
        ),
        (["toy", "--set", "inner.lr=nan"], "error: inner.lr is nan; it must be a finite number"),
        (["toy", "--set", "inner.clip=-1"], "error: inner.clip is -1; it must be positive"),
        (["toy", "--set", "optimizer.lr=-0.1"], "error: optimizer.lr is -0.1; it must be positive"),
        (
            ["toy", "--set", "model.depth=3"],
            "--set model.depth: there is no such field; there are name, model.vocab_size",
        ),
        (["toy", "--set", "model=3"], "no such field"),
        (["toy", "--lr", "0"], "error: optimizer.lr is 0.0; it must be positive"),
        (["toy", "--lr", "nan"], "error: optimizer.lr is nan; it must be a finite number"),
        (["toy", "--set", "model.window_size=0"], "error: model.window_size is 0; it must be at least 1"),
        (["toy", "--set", "model.binding.clip=0"], "error: model.binding.clip is 0; it must be positive"),
        (["toy", "--set", "optimizer.beta2=1"], "error: optimizer.beta2 is 1; it must lie in [0, 1)"),
        (["toy", "--set", "model.num_heads=3"], "error: model.width 128 does not divide into model.num_heads, 3;"),
        (
            ["toy", "--steps", "40", "--set", "optimizer.warmup_steps=41"],
            "error: optimizer.warmup_steps is 41; it cannot exceed optimizer.decay_steps, 40",
        ),
        (["toy", "--set", "max_bad_steps=0"], "error: max_bad_steps is 0; it must be at least 1"),
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


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_several_ranks_says_who_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Rank 0 alone warns; what went wrong each says once, with its number once."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    for said in (f"rank {rank} waited at step 7", "waited at step 7"):

        def open_nothing(path: object, said: str = said) -> None:
            warnings.warn(f"all see that {said}", stacklevel=1)
            raise UserError(said)

        monkeypatch.setattr("longread.data.TokenDataset.open", open_nothing)
        capsys.readouterr()
        assert main(["train", "toy", "--data", "data", "--out", str(tmp_path / "run")]) == 2
        warned = f"longread: warning: all see that {said}\n" if rank == 0 else ""
        assert capsys.readouterr().err == f"{warned}longread: error: rank {rank}: waited at step 7\n"


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
        monkeypatch.setattr("longread.train.settling.fit", mock.Mock(side_effect=error))
        assert "error: out of memory: a smaller batch (train: --set micro_batch_size=N)" in fails(
            capsys, *arguments, "--out", tmp_path / "run"
        )
    monkeypatch.setattr("longread.train.settling.fit", mock.Mock(side_effect=RuntimeError("something else")))
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


def config_of(run: Path) -> RunConfig:
    return RunConfig.from_dict(files.read_json(run / "run.json", kind="run")["config"])


TINY = [*MICROSCOPIC[:12], *MICROSCOPIC[18:]]
"""MICROSCOPIC with the steps and the schedules of the recipe."""


def test_the_dials_of_a_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "toy", "--data", str(home / "data"), *TINY[:12], *TINY[14:], "--out"]
    dials = ["--steps", "10", "--lr", "1e-3", "--batch-size", "3", "--seed", "7"]
    assert main([*arguments, str(tmp_path / "run"), *dials]) == 0
    config = config_of(tmp_path / "run")
    assert (config.steps, config.optimizer.decay_steps) == (10, 10)
    assert (config.optimizer.warmup_steps, config.inner.warmup_steps) == (1, 1)
    assert (config.optimizer.lr, config.batch_size, config.seed) == (1e-3, 3, 7)
    assert "warning" not in capsys.readouterr().err


def test_a_shorter_run_scales_its_schedules_but_for_those_that_are_set(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "toy", "--data", str(home / "data"), *TINY, "--out"]
    own = ["--set", "optimizer.warmup_steps=3", "--set", "inner.warmup_steps=6"]
    for name, settings in (("a", ["--set", "steps=10"]), ("b", [*own, "--set", "steps=10"]), ("c", ["--steps", "10"])):
        assert main([*arguments, str(tmp_path / name), *settings]) == 0
    a, b, c = (config_of(tmp_path / name) for name in "abc")
    assert a == c
    assert (a.optimizer.warmup_steps, a.inner.warmup_steps, a.optimizer.decay_steps) == (1, 1, 10)
    assert (b.optimizer.warmup_steps, b.inner.warmup_steps, b.optimizer.decay_steps) == (3, 6, 10)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == ["longread: warning: 6 of 10 steps warm up; lower inner.warmup_steps, or train longer"]


def test_a_run_goes_on_with_the_schedules_that_it_began_with(home: Path, tmp_path: Path) -> None:
    """Whatever its recipe has become since: more steps than there were, or another beginning of the warm-up."""
    arguments = ["train", "toy", "--data", str(home / "data"), *TINY, "--out", str(tmp_path / "run")]
    assert main([*arguments, "--steps", "10", "--set", "optimizer.initial_lr=0"]) == 0
    assert main([*arguments, "--resume", "--steps", "12"]) == 0
    assert main([*arguments, "--resume"]) == 0
    config = config_of(tmp_path / "run")
    assert (config.steps, config.optimizer.decay_steps, config.optimizer.warmup_steps) == (12, 10, 1)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 12
    assert rates[:2] == [0.0, 3e-3]


def test_the_last_row_as_json(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "toy", "--data", str(home / "data"), *MICROSCOPIC, "--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert main([*arguments, "--json", "-"]) == 0
    said = capsys.readouterr()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(said.out) == {"format": "longread-training/1", **row}
    assert "3 steps" in said.err
    assert main([*arguments, "--resume", "--json", str(tmp_path / "row.json"), "--quiet"]) == 0
    assert json.loads((tmp_path / "row.json").read_text())["step"] == 3
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    sentence = fails(capsys, *arguments, "--resume", "--json", tmp_path / "row.json")
    assert "row.json; --force replaces it" in sentence
    assert main([*arguments, "--resume", "--json", str(tmp_path / "row.json"), "--quiet", "--force"]) == 0


def test_a_diverging_training_has_a_status_of_its_own(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "--steps", "60", "--lr", "30", "--set", "optimizer.weight_decay=0", "--set", "max_bad_steps=3"]
    arguments = ["train", "toy", "--data", home / "data", "--out", tmp_path / "run", *settings]
    assert "it diverges since step" in fails(capsys, *arguments, status=3)


def test_short_notes_are_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 notes of 15 bytes have fewer tokens than one context."""
    (tmp_path / "notes").mkdir()
    for i in range(12):
        (tmp_path / "notes" / f"{i}.txt").write_text(f"note {i:02} says so")
    data = tmp_path / "data"
    arguments = ["train", "toy", "--data", data, "--out", tmp_path / "run", *MICROSCOPIC, "--context-length", 256]
    assert main(["prepare", str(tmp_path / "notes"), "--out", str(data), "--validation-fraction", "0.1"]) == 0
    assert main([str(a) for a in arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [30, 60, 90]
    joined = ["prepare", tmp_path / "notes", "--out", tmp_path / "joined", "--documents", "join"]
    assert main([str(a) for a in joined]) == 0
    arguments[3], arguments[5] = tmp_path / "joined", tmp_path / "other"
    assert "shorten the context, or prepare with documents reset, whose windows are padded" in fails(capsys, *arguments)


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
        patch.setattr("longread.train.TrainingProgress.__call__", lambda *_: os.kill(os.getpid(), number))
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
