"""A run that is killed, at any moment and as often as one likes, becomes the run that was never killed."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longread import checkpoint
from longread.config import InnerConfig, ModelConfig, OptimizerConfig, RunConfig
from longread.data import TokenDataset, prepare
from longread.record import TIMING_FIELDS
from longread.tokenizer import ByteTokenizer
from longread.train import train
from tests.forked import PROCESSES

CONFIG = RunConfig(
    name="mortal",
    model=ModelConfig(
        vocab_size=257,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=16,
        window_size=8,
        mini_batch_size=8,
        num_suffix_blocks=1,
    ),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=4, decay_steps=15),
    inner=InnerConfig(clip=0.2, warmup_steps=10),
    context_length=32,
    batch_size=4,
    micro_batch_size=2,
    steps=15,
    evaluate_every=5,
    checkpoint_every=3,
)
# Every way in which the library touches the disk while it saves.
TOUCHES = [(os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "unlink"), (Path, "rmdir"), (Path, "write_text")]


def work(data: Path, run: Path, die_at: int | None, keep: int) -> None:
    """What a process does: trains, and dies at its `die_at`-th touch of the disk, before it or just after."""
    torch.set_num_threads(1)
    gc.freeze()  # what is imported by now stays
    if die_at is not None:
        touches = itertools.count()
        for owner, name in TOUCHES:
            setattr(owner, name, mortal(getattr(owner, name), touches, die_at))
    config = dataclasses.replace(CONFIG, keep_checkpoints=keep)
    dataset = TokenDataset.open(data)
    result = train(config, dataset, run, validation=dataset.validation, resume=True)
    os._exit(7 if result.interrupted else 0)


def mortal(touch: Callable[..., Any], touches: itertools.count[int], die_at: int) -> Callable[..., Any]:
    def touch_and_die(*args: Any, **kwargs: Any) -> Any:
        now = next(touches)
        if now == die_at and die_at % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        found = touch(*args, **kwargs)
        if now == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return touch_and_die


def start(data: TokenDataset, run: Path, die_at: int | None = None, keep: int = 2) -> Any:
    process = PROCESSES.Process(target=work, args=(data.directory, run, die_at, keep))
    process.start()
    return process


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    directory = tmp_path_factory.mktemp("data")
    words = [f"word{i * i % 97} " for i in range(600)]
    for i in range(6):
        (directory / f"{i}.txt").write_text("".join(words[i * 80 : i * 80 + 120]))
    sources = sorted(directory.glob("*.txt"))
    return prepare(sources, directory / "data", ByteTokenizer(), documents="join", validation_fraction=0.3)


@pytest.fixture(scope="module")
def whole(data: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = start(data, run, keep=100)
    process.join()
    assert process.exitcode == 0
    assert len(list((run / "checkpoints").iterdir())) == 5
    return run


def check_survivors(run: Path, whole: Path) -> None:
    """Every committed checkpoint is the one of the uninterrupted run, and the newest one loads."""
    for marker in (run / "checkpoints").glob("*/COMMITTED"):
        for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
            expected = whole / "checkpoints" / marker.parent.name / name
            assert (marker.parent / name).read_bytes() == expected.read_bytes()
    newest = checkpoint.newest_checkpoint(run)
    if newest is not None:
        checkpoint.read_checkpoint(newest)
        checkpoint.load_model(run)


def check_finished(run: Path, whole: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    assert rows_of(run) == rows_of(whole)
    assert list(run.rglob(".*tmp*")) == []
    newest = sorted((run / "checkpoints").glob("*/COMMITTED"))[-2:]
    assert [marker.parent.name for marker in newest] == ["step-00000012", "step-00000015"]


def killed(data: TokenDataset, run: Path, moments: random.Random) -> bool:
    """Lets a process work on `run` and kills it, at a random time or inside a random save; False if it finished."""
    if moments.random() < 0.5:
        process = start(data, run, die_at=moments.randrange(80))
        process.join()
    else:
        process = start(data, run)
        process.join(moments.uniform(0.2, 1.5))
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_and_resume(data: TokenDataset, whole: Path, directory: Path, kills: int, seed: int) -> None:
    """Kills runs until `kills` have been survived; each run goes on until it is finished."""
    moments, done = random.Random(seed), 0
    for number in itertools.count():
        run = directory / str(number)
        while done < kills and killed(data, run, moments):
            done += 1
            check_survivors(run, whole)
        last = start(data, run)
        last.join()
        assert last.exitcode == 0
        check_finished(run, whole)
        if done == kills:
            return


def test_three_kills_change_nothing(data: TokenDataset, whole: Path, tmp_path: Path) -> None:
    kill_and_resume(data, whole, tmp_path, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_thirty_kills_change_nothing(data: TokenDataset, whole: Path, tmp_path: Path, seed: int) -> None:
    kill_and_resume(data, whole, tmp_path, kills=30, seed=seed)


@pytest.mark.parametrize("die_at", [3, 30, *(pytest.param(at, marks=pytest.mark.slow) for at in (17, 44))])
def test_a_kill_inside_a_save_changes_nothing(data: TokenDataset, whole: Path, tmp_path: Path, die_at: int) -> None:
    process = start(data, tmp_path / "run", die_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    check_survivors(tmp_path / "run", whole)
    process = start(data, tmp_path / "run")
    process.join()
    check_finished(tmp_path / "run", whole)


def test_sigterm_saves_and_exits_cleanly(data: TokenDataset, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(data, run)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 7
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None
    assert checkpoint.read_checkpoint(newest).step == rows_of(run)[-1]["step"] < CONFIG.steps
    process = start(data, run)
    process.join()
    assert process.exitcode == 0
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert rows_of(run) == rows_of(whole)
