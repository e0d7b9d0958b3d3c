"""A signal and its echo are one request; and what becomes of a run that is stopped as `timeout` stops it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

import pytest

from longread import checkpoint, signals
from longread.cli import main
from longread.signals import Requests
from longread.train import progress
from tests.forked import Forked
from tests.test_cli import MICROSCOPIC, SENTENCES

LONGEST_WAIT = 300.0
"""Seconds; only a process that hangs takes as long."""


def test_an_echo_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: None)
    requests, heard = Requests(), []
    for seconds, number in ((0, 15), (0.01, 15), (0.01, 2), (0.05, 2), (0.02, 15), (0.2, 15), (0, 15)):
        now[0] += seconds
        heard.append(requests.is_new(number))
    assert heard == [True, False, True, False, False, True, False]


def test_an_echo_is_heard_while_the_first_is_handled() -> None:
    """Not after whatever comes next, which may take longer than an echo does."""
    requests, heard, begun = Requests(), list[bool](), list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        if not begun:
            begun.append(number)
            os.kill(os.getpid(), number)
        heard.append(requests.is_new(number))

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(heard) == [False, True]


def talkative(arguments: list[str]) -> int:
    """Every step of the training says something."""
    progress._SECONDS_BETWEEN_LINES = 0.0
    return main(arguments)


def test_a_training_that_timeout_stops_keeps_what_it_has(tmp_path: Path) -> None:
    """The signal comes twice, and nobody reads its messages any more: whoever did was stopped too."""
    (tmp_path / "text.txt").write_text(SENTENCES)
    assert main(["prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data")]) == 0
    endless = [*MICROSCOPIC, "--set", "steps=1000000", "--set", "optimizer.decay_steps=1000000"]
    arguments = ["train", "toy", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *endless]
    process = Forked(talkative, arguments)
    line = process.stderr.readline()
    while line and not line.startswith("step "):
        line = process.stderr.readline()
    assert line.startswith("step ")
    process.stdout.close()
    process.stderr.close()
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=LONGEST_WAIT) == 143
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert checkpoint.read_checkpoint(newest).step == len(rows)
