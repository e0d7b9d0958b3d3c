"""A long reading that is disturbed, anywhere and by anything, goes on and ends as one that never was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from longread.checkpoint import load_model
from longread.cli import main
from longread.session import Session
from longread.session.text import LONGEST_PIECE
from tests.small_model import save_small_model

SENTENCE = "the whale swam naïve – slowly beneath cold stars while nobody watched it, and then it 🐋 turned\n"
TEXT = " ".join(random.Random(0).choices(SENTENCE.split(), k=180))
FAULTS = ("SIGINT", "SIGTERM", "killed", "disk", "memory", "bad byte")


class Killed(BaseException):
    """As SIGKILL ends a process: nothing of the program runs afterwards that would notice."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("home") / "model"
    save_small_model(directory, seed=0)
    return directory


@pytest.fixture
def home(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text as working directory, and readings in pieces of 64 tokens."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(LONGEST_PIECE, "cpu", 64)
    return tmp_path


def read(*arguments: str, every: str = "0", save: str = "s") -> int:
    command = ["read", *arguments, "--model", "model", "--device", "cpu", "--save", save, "--save-every", every]
    return main([*command, "--quiet"])


def restored(name: str = "s") -> Session:
    return Session.restore(name, load_model("model").model)


def assert_same(one: Session, other: Session) -> None:
    """Bit for bit, and with the same figures but for the seconds."""
    assert all(torch.equal(a, b) for a, b in zip(one.state.tensors, other.state.tensors, strict=True))
    assert (one.position, one.recent, one.steps, one.rolled_back) == (
        other.position,
        other.recent,
        other.steps,
        other.rolled_back,
    )
    assert one.text is not None
    assert other.text is not None
    assert (one.text.num_bytes, one.text.sha256, one.text.whole) == (
        other.text.num_bytes,
        other.text.sha256,
        other.text.whole,
    )


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    directory = tmp_path_factory.mktemp("undisturbed")
    (directory / "text").write_text(TEXT)
    names = [str(directory / "text"), "--model", str(model), "--device", "cpu", "--save", str(directory / "s")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LONGEST_PIECE, "cpu", 64)
        assert main(["read", *names, "--save-every", "0", "--quiet", "--no-control"]) == 0
    return Session.restore(directory / "s", load_model(model).model)


class Faults:
    """One fault of one kind, after so many pieces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self._patch, self._home = monkeypatch, home
        self._read, self._fsync = Session.read, os.fsync

    def strike(self, kind: str, after: int, halfway: bool, *more: str) -> int:
        """Goes on with the reading until the fault comes; gives its exit status."""
        calls = 0

        def reading(session: Session, ids: list[int]) -> torch.Tensor:
            nonlocal calls
            calls += 1
            nll = self._read(session, ids) if halfway or calls != after else None
            if calls == after:
                if kind == "killed":
                    raise Killed
                if kind == "memory":
                    raise MemoryError
                if kind.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, kind))
            return self._read(session, ids) if nll is None else nll

        def full(descriptor: int) -> None:
            if calls >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._fsync(descriptor)

        data = TEXT.encode()
        with self._patch.context() as patch:
            patch.setattr(Session, "read", reading)
            if kind == "disk":
                patch.setattr(os, "fsync", full)
            if kind == "bad byte":
                place = min(len(data), 200 + 64 * after)
                (self._home / "text").write_bytes(data[:place] + b"\xff" + data[place:])
            try:
                return read("text", "--resume", *more)
            except Killed:
                return -9
            finally:
                (self._home / "text").write_bytes(data)


STATUS = {"SIGINT": 130, "SIGTERM": 143, "killed": -9, "disk": 2, "memory": 2, "bad byte": 2}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reading_that_is_disturbed_at_random_places_is_the_undisturbed_one(
    home: Path, undisturbed: Session, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    faults = Faults(monkeypatch, home)
    reached = []
    for _ in range(10):
        kind = chance.choice(FAULTS)
        status = faults.strike(kind, chance.randint(1, 9), chance.random() < 0.5)
        assert status in (STATUS[kind], 0)
        if Path("s").exists():
            text = restored().text
            assert text is not None
            reached.append(text.num_bytes)
            assert text.sha256 == hashlib.sha256(TEXT.encode()[: text.num_bytes]).hexdigest()
    assert reached == sorted(reached)
    assert read("text", "--resume") == 0
    assert_same(restored(), undisturbed)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("halfway", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_fault_keeps_what_was_read_and_says_how_to_go_on(
    home: Path,
    undisturbed: Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    halfway: bool,
) -> None:
    assert Faults(monkeypatch, home).strike(kind, 10, halfway, "--no-control") == STATUS[kind]
    text = restored().text
    assert text is not None
    assert not text.whole
    assert text.num_bytes > 300
    err = capsys.readouterr().err
    if kind != "killed":
        assert f"s holds the text up to byte {text.num_bytes:,}" in err
        assert (
            "\n  longread read text --resume --no-control --model model --device cpu --save s --save-every 0 --quiet\n"
            in err
        )
    assert read("text", "--resume") == 0
    assert_same(restored(), undisturbed)


def test_the_same_command_without_resume_loses_nothing(
    home: Path, undisturbed: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Faults(monkeypatch, home).strike("SIGINT", 9, False)
    before = Path("s").read_bytes()
    assert read("text") == 2
    assert "--save would replace s; --resume goes on with it, --force replaces it" in capsys.readouterr().err
    assert Path("s").read_bytes() == before
    assert read("text", "--force") == 0
    assert_same(restored(), undisturbed)


def test_another_text_is_refused_with_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Faults(monkeypatch, home).strike("SIGTERM", 10, False, "--no-control")
    before, data = Path("s").read_bytes(), TEXT.encode()
    for other, reason in (
        (data[:100] + b"X" + data[101:], "its first .* bytes are not those that were read"),
        (data[:101], "the text ends after 101 bytes, and .* of it were read"),
        (b"X" + data, "its first .* bytes are not those that were read"),
    ):
        Path("text").write_bytes(other)
        capsys.readouterr()
        assert read("text", "--resume") == 2
        error = capsys.readouterr().err
        assert re.search(f"longread: error: s has read another text: {reason}; give the text", error), error
        assert error.count("\n") == 1
        assert Path("s").read_bytes() == before


def test_session_goes_on_in_its_own_text_and_after_it_with_another(
    home: Path, undisturbed: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    Faults(monkeypatch, home).strike("SIGTERM", 9, False)
    stopped = restored()
    assert read("text", "--session", "s", save="same") == 0
    assert_same(restored("same"), undisturbed)
    Path("other").write_text("Another text altogether, and a short one.")
    assert read("other", "--session", "s", save="after") == 0
    assert restored("after").position == stopped.position + len(Path("other").read_bytes())
    assert read("text", "--session", "same", save="twice") == 0  # one that was read to its end is read again
    assert restored("twice").position == 1 + 2 * len(TEXT.encode())


def test_a_text_that_has_grown_is_gone_on_with(home: Path) -> None:
    data = TEXT.encode()
    Path("log").write_bytes(data[:350])
    assert read("log", "--resume") == 0
    assert read("log", "--resume") == 0  # nothing new
    assert restored().position == 351
    Path("log").write_bytes(data[:700])
    assert read("log", "--resume") == 0
    text = restored().text
    assert text is not None
    assert (text.num_bytes, text.sha256) == (700, hashlib.sha256(data[:700]).hexdigest())
    Path("rest").write_bytes(data[350:700])
    Path("first").write_bytes(data[:350])
    assert read("first", "rest", save="two") == 0
    assert_same(restored("two"), restored())


def test_several_texts_are_read_in_order_and_gone_on_with(
    home: Path, undisturbed: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TEXT.encode()
    for i, part in enumerate((data[:350], data[350:360], data[360:])):
        Path(f"part{i}").write_bytes(part)
    names = [f"part{i}" for i in range(3)]
    assert read(*names, save="whole") == 0
    for after in (1, 3, 6):
        calls = itertools.count()

        def reading(session: Session, ids: list[int], read=Session.read, calls=calls, after=after) -> torch.Tensor:
            if next(calls) == after:
                raise Killed
            return read(session, ids)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "read", reading)
            with contextlib.suppress(Killed):
                read(*names, "--resume", "--no-control")
    assert read(*names, "--resume") == 0
    assert_same(restored(), restored("whole"))


def test_a_session_file_has_one_size_whatever_was_read(home: Path) -> None:
    sizes = set()
    for count in (488, 616, 776):  # as many tokens wait for the rest of their mini-batch
        Path("text").write_bytes(TEXT.encode()[:count])
        assert read("text", save=f"s{count}") == 0
        sizes.add(Path(f"s{count}").stat().st_size)
    assert len(sizes) == 1


def test_figures_of_a_reading_that_went_on_are_about_all_of_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("text", "--json", "whole.json", "--no-control", save="undisturbed") == 0
    Faults(monkeypatch, home).strike("SIGINT", 9, False)
    assert read("text", "--json", "j.json", "--resume") == 0
    whole, j = (json.loads(Path(name).read_text()) for name in ("whole.json", "j.json"))
    for figures in (whole, j):
        for result in figures["results"]:
            del result["seconds"]
        del figures["text"]["save"]
    assert j == whole


def test_a_stop_without_a_place_to_save_says_what_is_lost(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reads = itertools.count()

    def reading(session: Session, ids: list[int], read=Session.read) -> torch.Tensor:
        if next(reads) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return read(session, ids)

    monkeypatch.setattr(Session, "read", reading)
    assert main(["read", "text", "--model", "model", "--device", "cpu"]) == 130
    out, err = capfd.readouterr()
    assert "stopping; without --save only the figures are left of what was read" in err
    assert "nothing is saved; with --save FILE a reading can be gone on with" in err
    assert "The reading was interrupted (Ctrl-C): the figures are about its first" in out


def test_an_echo_of_a_signal_does_not_hurry(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`timeout` sends its signal twice: the figures are shown all the same."""
    reads = itertools.count()

    def reading(session: Session, ids: list[int], read=Session.read) -> torch.Tensor:
        if next(reads) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return read(session, ids)

    monkeypatch.setattr(Session, "read", reading)
    assert main(["read", "text", "--model", "model", "--device", "cpu", "--save", "s"]) == 143
    out, err = capfd.readouterr()
    assert "The reading was interrupted (SIGTERM): the figures are about its first" in out
    assert err.count("stopping, and keeping") == 1
    assert "ending at once" not in err


def test_a_second_signal_loses_nothing_that_was_saved(
    home: Path, undisturbed: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It comes while the first one's save is being written, and again: the save is whole, the figures are left out."""
    reads, fsync = itertools.count(), os.fsync
    monkeypatch.setattr("longread.signals.ECHO", 0.0)

    def reading(session: Session, ids: list[int], read=Session.read) -> torch.Tensor:
        if next(reads) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return read(session, ids)

    def interrupted(descriptor: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "read", reading)
        patch.setattr(os, "fsync", interrupted)
        assert main(["read", "text", "--model", "model", "--device", "cpu", "--save", "s"]) == 130
    out, err = capfd.readouterr()
    assert "ending at once, without the figures" in err
    assert out == ""
    text = restored().text
    assert text is not None
    assert f"s holds the text up to byte {text.num_bytes:,}" in err
    assert read("text", "--resume") == 0
    assert_same(restored(), undisturbed)


def test_going_on_removes_what_a_killed_save_left(home: Path) -> None:
    assert read("text") == 0
    left, others = home / ".s.0123abcd.tmp", home / ".s2.0123abcd.tmp"
    left.write_bytes(b"half a session")
    others.write_bytes(b"of another")
    assert read("text", "--resume") == 0
    assert (left.exists(), others.exists()) == (False, True)


def test_room_for_the_session_is_looked_for_first(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(Session, "read", lambda *_: pytest.fail("the text was read"))
    assert read("text") == 2
    error = capsys.readouterr().err
    assert re.search(r"--save s needs \d+ MiB and the disk has 0 left; free some space", error), error


def test_a_closed_stdin_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert read("-") == 2
    assert capsys.readouterr().err == "longread: error: stdin is closed; give a file, or a text on stdin\n"
    assert not Path("s").exists()


def test_texts_of_a_directory_are_read_in_order_and_others_left_out(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes").mkdir()
    for name, data in (("a.txt", b"one text\r\n"), ("b.png", b"\x89PNG\r\n\x1a\n more"), ("c.txt", b"and another")):
        (Path("notes") / name).write_bytes(data)
    assert read("notes") == 0
    assert "left out: notes/b.png is a PNG picture" in capsys.readouterr().err
    text = restored().text
    assert text is not None
    assert text.sha256 == hashlib.sha256(b"one text\nand another").hexdigest()


def test_resume_needs_a_reading_to_go_on_with(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["read", "text", "--model", "model", "--device", "cpu", "--resume"]
    assert main(command) == 2
    assert "give --save or --session" in capsys.readouterr().err
    session = Session(load_model("model").model, load_model("model").inner)
    session.read([1, 2, 3])
    session.save("python")
    assert main([*command, "--save", "python"]) == 2
    assert "python does not say how far it is in a text" in capsys.readouterr().err
