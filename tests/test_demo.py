"""The two demos: `longread demo`, and the one that trains, but for its ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.demo import clear
from longread.cli import demo, main
from longread.config import UserError
from longread.loading import open_model

TEXT = "def add(first, second):\n    return first + second\n\n\nHe said that it was a very fine day. "


def test_it_reads_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CONTINUATION", 8)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60, encoding="utf-8")
    assert main(["demo", str(text), "--tokens", "1200", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "1,024–1,200" in out
    assert "Learning gains" in out
    assert out.count("How it goes on") == 2
    assert "with the model longread-small" in err


def test_without_a_text_it_reads_what_the_model_has_not_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = demo.unseen_library(open_model("longread-small", "cpu"))
    assert text.startswith("# python/argparse.py\n")
    assert "# python/urllib/parse.py\n" in text
    monkeypatch.setattr(demo, "CONTINUATION", 4)
    assert main(["demo", "--tokens", "1100", "--device", "cpu"]) == 0
    assert "The text: 1,100 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["short"], "the text has 3 tokens; give one of more than 1024"),
        (["none"], "none"),
        (["--tokens", "1024"], "--tokens is 1024; give more than 1024"),
        (["--model", "unknown"], "there is no model at unknown"),
    ],
)
def test_what_it_cannot_read(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("very short", encoding="utf-8")
    assert main(["demo", *arguments, "--device", "cpu"]) == 2
    assert reason in capsys.readouterr().err


def test_a_model_that_names_no_part_of_the_library_needs_a_text() -> None:
    opened = open_model("longread-small", "cpu")._replace(name="mine", provenance={})
    with pytest.raises(UserError, match=r"mine names no part of Python's library here .* give FILE to read"):
        demo.unseen_library(opened)


def test_an_earlier_demo_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    clear(tmp_path / "missing")
    (tmp_path / "e2e").mkdir()
    (tmp_path / "summary.json").touch()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
    for name in ("thesis.txt", "data"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="other files than those of an earlier demo"):
        clear(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "thesis.txt").unlink()
    with pytest.raises(UserError):  # no data set of ours
        clear(tmp_path)
