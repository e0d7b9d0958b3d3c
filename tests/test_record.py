"""What a run leaves behind: facts without secrets, whole rows, and the same numbers in every tracker."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from longread import record
from longread.config import ModelConfig, OptimizerConfig, RunConfig, UserError

CONFIG = RunConfig(
    name="small",
    model=ModelConfig(
        vocab_size=9,
        width=8,
        num_blocks=1,
        num_heads=1,
        mlp_hidden=8,
        window_size=4,
        mini_batch_size=4,
        num_suffix_blocks=1,
    ),
    optimizer=OptimizerConfig(lr=0.1),
    context_length=8,
    batch_size=1,
    steps=1,
)


def test_a_run_is_described_without_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "swordfish-1234")
    facts = record.describe_run(CONFIG, ["longread", "train", "toy"])
    assert RunConfig.from_dict(facts["config"]) == CONFIG
    assert facts["command"] == ["longread", "train", "toy"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["processors"] == os.cpu_count()
    written = json.dumps(facts)
    assert "swordfish" not in written
    assert os.environ["PATH"] not in written


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "record.py"
    code.write_text("x = 1\n")
    monkeypatch.setattr(record, "__file__", str(code))
    assert record.code_commit() is None

    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *identity, *command], text=True).strip()

    git("init", "-q")
    assert record.code_commit() is None, "the repository does not hold the code"
    git("add", "record.py")
    git("commit", "-q", "-m", "begin")
    assert record.code_commit() == git("rev-parse", "HEAD")
    code.write_text("x = 2\n")
    assert record.code_commit() == git("rev-parse", "HEAD") + "+changes"


def test_metrics_are_one_whole_line_a_row(tmp_path: Path) -> None:
    log = record.MetricsLog(tmp_path / "metrics.jsonl")
    assert log.size == 0
    log.append({"step": 1, "loss": 2.5})
    size = log.size
    log.append({"step": 2, "loss": math.nan})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": None},
    ]
    assert log.truncate(size)
    log.append({"step": 2, "loss": 2.0})
    assert log.path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n'


def test_a_log_that_was_cut_short_keeps_its_whole_lines(tmp_path: Path) -> None:
    log = record.MetricsLog(tmp_path / "metrics.jsonl")
    assert log.truncate(0)
    assert not log.truncate(5)
    log.path.write_text('{"step": 1}\n{"st')
    assert not log.truncate(100)
    assert log.path.read_text() == '{"step": 1}\n'


def test_a_full_disk_leaves_no_half_row(tmp_path: Path) -> None:
    log = record.MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 4, before[1]))  # the kernel writes 4 bytes and refuses
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):
            log.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.path.read_text() == '{"step": 1}\n'


def open_tracker(name: str, directory: Path, step: int = 1) -> record.Tracker:
    run = {"config": {"name": "small"}}
    return record.open_tracker(name, directory=directory, run_id="abcd", run=run, step=step)


def test_tensorboard_gets_the_metrics_and_a_resumed_run_replaces_its_tail(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(1, 4), range(3, 6)):
        tracker = open_tracker("tensorboard", tmp_path, steps[0])
        for step in steps:
            tracker.log(step, {"loss": 10.0 * steps[0] + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 11.0),
        (2, 12.0),
        (3, 33.0),
        (4, 34.0),
        (5, 35.0),
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_metrics_and_resume_by_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    package: Any = types.ModuleType(name)
    package.log = lambda metrics, step: calls.append(("log", (step, metrics)))
    package.finish = lambda: calls.append(("finish", None))

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        return package

    package.init = init
    monkeypatch.setitem(sys.modules, name, package)
    tracker = open_tracker(name, tmp_path)
    tracker.log(7, {"loss": 1.5})
    tracker.close()
    (_, options), *rest = calls
    assert rest == [("log", (7, {"loss": 1.5})), ("finish", None)]
    assert options["project"] == "longread"
    assert options["resume"] == "allow"
    assert "abcd" in (options.get("id"), options["name"][-4:])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_says_what_installs_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"run pip install {name}$"):
        open_tracker(name, tmp_path)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracker 'abacus'; choose from tensorboard, wandb, trackio"):
        open_tracker("abacus", tmp_path)
