"""What programs read: JSON on stdout and nothing else there, all that is for people on stderr, or nowhere if quiet."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from longread.cli import main
from tests.forked import Forked
from tests.small_model import TEXT, save_small_model

EVALUATE = ["evaluate", "model", "--data", "texts", "--no-control", "--device", "cpu"]
NEEDLE = ["needle", "model", "--contexts", "400", "--depths", "0", "--samples", "1", "--max-tokens", "1"]
NEEDLE += ["--no-control", "--device", "cpu"]
PREPARE = ["prepare", "texts", "--out", "data", "--overwrite"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a text as working directory."""
    save_small_model(tmp_path / "model", seed=0)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "t0.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHOWN = [
    (EVALUATE, "longread-evaluation/1", "Loss by position"),
    (NEEDLE, "longread-needle/1", "S-NIAH-1"),
    (PREPARE, "longread-prepare/1", "1 documents"),
    (["estimate", "3b", "--memory", "139"], "longread-estimate/1", "that write at once"),
    (["estimate", "3b", "--train", "1", "--memory", "139"], "longread-estimate/1", "the first that fits into"),
    (["read", "texts/t0.txt", "--model", "model", "--device", "cpu"], "longread-evaluation/1", "tokens read"),
]
"""Commands, the formats of what they find, and what they show of it."""


def named(value: object) -> str:
    return str(value[0]) if isinstance(value, list) else ""


@pytest.mark.parametrize(("command", "form", "shown"), SHOWN, ids=named)
@pytest.mark.parametrize("place", ["-", "/dev/stdout"])
def test_json_on_stdout_is_all_there(
    home: Path, capfd: pytest.CaptureFixture[str], command: list[str], form: str, shown: str, place: str
) -> None:
    assert main([*command, "--json", place]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["format"] == form
    assert shown in err
    assert not (home / "-").exists()
    assert main([*command, "--json", place, "--quiet"]) == 0
    again, err = capfd.readouterr()
    assert json.loads(again)["format"] == form
    assert err == ""


@pytest.mark.parametrize(("command", "shown"), [(command, shown) for command, _, shown in SHOWN], ids=named)
def test_figures_are_on_stdout_unless_it_is_quiet(
    home: Path, capfd: pytest.CaptureFixture[str], command: list[str], shown: str
) -> None:
    assert main(command) == 0
    assert shown in capfd.readouterr().out
    assert main([*command, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_page_on_stdout_is_all_there(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*EVALUATE, "--report", "-"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("<!doctype html>")
    assert "Loss by position" in err


def test_two_outputs_do_not_share_stdout(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVALUATE, "--json", "-", "--report", "/dev/stdout"]) == 2
    assert "--json and --report are both /dev/stdout; give each a file of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            ["read", "texts/t0.txt", "--model", "model", "--save", "-"],
            "--save - is stdout, which cannot be gone on with",
        ),
        (["bench", "prefill", "--json", "-"], "--json - is stdout, which cannot be gone on with"),
    ],
)
def test_what_is_no_text_does_not_go_to_stdout(
    home: Path, capsys: pytest.CaptureFixture[str], command: list[str], sentence: str
) -> None:
    assert main(command) == 2
    assert f"{sentence}; give the name of a file" in capsys.readouterr().err


def into(path: str, arguments: list[str]) -> int:
    """As after `>>`."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), 1)
    return main(arguments)


def without_stdout(arguments: list[str]) -> int:
    """As after `>&-`: Python makes no file of what is closed."""
    os.close(1)
    sys.stdout = None  # type: ignore[assignment]
    return main(arguments)


def test_a_stdout_that_is_closed_or_a_file(home: Path) -> None:
    """The file that a shell has opened keeps what comes after: it is written to, not replaced."""
    arguments = [*PREPARE, "--json", "/dev/stdout"]
    closed = Forked(without_stdout, arguments)
    _, errors = closed.communicate(300)
    assert closed.returncode == 2
    assert "cannot write to stdout: it is closed; give the name of a file" in errors
    with open("out", "wb") as out:
        out.write(b"before\n")
        out.flush()
        process = Forked(into, "out", arguments)
        _, errors = process.communicate(300)
        assert process.returncode == 0, errors
        out.seek(0, os.SEEK_END)
        out.write(b"after\n")
    lines = Path("out").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert json.loads("".join(lines[1:-1]))["train"]["documents"] == 1
