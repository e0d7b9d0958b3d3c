"""Readings as processes: a pipe that is interrupted, and, slowly, 20 disturbances at random places of a file."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from longread.checkpoint import load_model
from longread.cli import main
from longread.config import UserError
from longread.session import Session
from tests.forked import Forked
from tests.small_model import save_small_model

LONGEST_WAIT = 300.0
"""Seconds; only a reader that hangs takes as long."""
SENTENCE = "the whale swam naïve – slowly beneath cold stars while nobody watched it, and then it 🐋 turned\n"
WORDS = SENTENCE.split()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_small_model(tmp_path / "model", seed=0)
    return tmp_path


def starving(directory: Path, limit: int, arguments: list[str]) -> int:
    """A file may not grow beyond that: the kernel refuses, as on a full disk."""
    os.chdir(directory)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return main(arguments)


class Reader:
    """A process that reads, and saves after every piece."""

    def __init__(self, home: Path, text: str, save: str, *more: str, room: int | None = None) -> None:
        command = ["read", text, "--model", "model", "--device", "cpu", "--save", save]
        command += ["--save-every", "0", "--no-control", *more]
        self.save = home / save
        self.process = Forked(starving, home, resource.RLIM_INFINITY if room is None else room, command)

    def reaches(self, num_bytes: int) -> bool:
        """Waits until so many bytes are saved, or the process has ended; says which."""
        model, ends = load_model(self.save.parent / "model").model, time.monotonic() + LONGEST_WAIT
        newest = 0
        while self.process.poll() is None:
            found = self.save.stat().st_ino if self.save.exists() else 0
            if found != newest and bytes_saved(self.save, model) >= num_bytes:
                return True
            newest = found
            assert time.monotonic() < ends
            time.sleep(0.02)
        return False


def bytes_saved(path: Path, model: torch.nn.Module) -> int:
    try:
        text = Session.restore(path, model).text  # type: ignore[arg-type]
    except UserError:
        return 0
    return text.num_bytes if text is not None else 0


def test_stdin_that_is_interrupted_keeps_what_came(home: Path) -> None:
    """SIGINT while waiting for more: what came is reported and saved, and the status says so."""
    reader = Reader(home, "-", "s")
    assert reader.process.stdin is not None
    reader.process.stdin.write(" ".join(random.Random(0).choices(WORDS, k=1000))[:4000])
    reader.process.stdin.flush()
    assert reader.reaches(4095)  # the last whole piece: there is nothing to do but wait for more
    reader.process.send_signal(signal.SIGINT)
    out, err = reader.process.communicate(timeout=LONGEST_WAIT)
    assert reader.process.returncode == 130, err
    assert "stopping, and keeping what was read in s" in err
    assert "The reading was interrupted (Ctrl-C)" in out
    assert bytes_saved(home / "s", load_model(home / "model").model) > 4200


@pytest.mark.slow
def test_twenty_disturbances(home: Path) -> None:
    """Killed, interrupted, starved of disk, fed a bad byte, each at a random place: the session is the undisturbed one,
    bit for bit."""
    chance = random.Random(int(os.environ.get("LONGREAD_DRILL_SEED", "0")))
    text = " ".join(chance.choices(WORDS, k=3000))
    data = text.encode()
    (home / "text").write_bytes(data)
    whole = Reader(home, "text", "undisturbed")
    whole.process.communicate(timeout=LONGEST_WAIT)
    assert whole.process.returncode == 0
    model = load_model(home / "model").model
    places = sorted(chance.sample(range(2000, len(data) - 4000), 20))
    kinds = ["SIGKILL", "SIGINT", "SIGTERM", "disk", "bad byte"] * 4
    chance.shuffle(kinds)
    for kind, place in zip(kinds, places, strict=True):
        before = bytes_saved(home / "s", model)
        if kind == "bad byte":
            (home / "text").write_bytes(data[:place] + b"\xff" + data[place:])
        reader = Reader(home, "text", "s", "--resume", room=4096 if kind == "disk" else None)
        if kind.startswith("SIG"):
            reader.reaches(max(place, before + 1))
            reader.process.send_signal(getattr(signal, kind))
        _, err = reader.process.communicate(timeout=LONGEST_WAIT)
        (home / "text").write_bytes(data)
        assert "Traceback" not in err, err
        status = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}.get(kind, 2)
        saved = bytes_saved(home / "s", model)
        assert reader.process.returncode == status or saved == len(data), err  # the signal may come after the end
        assert saved == before if kind == "disk" else saved >= max(before, place - 2000)
    last = Reader(home, "text", "s", "--resume")
    last.process.communicate(timeout=LONGEST_WAIT)
    assert last.process.returncode == 0
    one, other = (Session.restore(home / name, model) for name in ("s", "undisturbed"))
    assert all(torch.equal(a, b) for a, b in zip(one.state.tensors, other.state.tensors, strict=True))
    assert (one.position, one.recent, one.steps) == (other.position, other.recent, other.steps)
    assert one.text is not None
    assert one.text.whole
