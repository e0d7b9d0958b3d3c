"""`--kept-tokens` of the commands, and sessions that go on without it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.checkpoint import save_model
from longread.cli import main
from longread.loading import open_model
from longread.model import Transformer, initialize
from longread.tokenizer import ByteTokenizer
from tests import tiny
from tests.small_model import TEXT, save_small_model

N = 16
NAMES = ("Alder", "Birch", "Cedar", "Elm", "Fern", "Gorse", "Hazel", "Ivy")
PROSE = "\n\n".join(f"On day number {i} a walker went over the hill and met {NAMES[i % 8]} there." for i in range(40))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and a text, in which commands run."""
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "model", seed=1)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "prose").write_text(PROSE)
    return tmp_path


def longread(line: str) -> int:
    return main(shlex.split(line))


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command prints which is refused."""
    assert longread(f"{line} --quiet") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_text_is_read_and_gone_on_with_as_in_python(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keeping = open_model("model", "cpu").keeping(N)
    session = keeping.session()
    session.read(TEXT)
    assert longread(f"read text --model model --kept-tokens {N} --save s") == 0
    assert f"model with {N} tokens kept" in capsys.readouterr().out
    saved = keeping.restore("s")
    assert saved.state.kept is not None
    assert len(saved.state.kept.position[0]) == N
    for x, y in zip(saved.state.tensors, session.state.tensors, strict=True):
        assert torch.equal(x, y)
    session.read(" Once more")
    for option in ("", f"--kept-tokens {N}"):
        command = f"generate --model model --session s --prompt ' Once more' --max-tokens 9 --temperature 0 {option}"
        assert longread(f"{command} --save after --force") == 0
        after = open_model("model", "cpu").restore("after")
        assert after.model.config.kept_tokens == N
        assert after.recent[-9:] == list(session.fork().generate(9, temperature=0))


def test_a_reading_is_resumed_without_the_option(home: Path) -> None:
    command = "read text --model model --quiet --no-control"
    assert longread(f"{command} --save whole --kept-tokens {N}") == 0
    Path("text").write_text(TEXT[:350])
    assert longread(f"{command} --save s --kept-tokens {N}") == 0
    Path("text").write_text(TEXT)
    assert longread(f"{command} --save s --resume") == 0
    opened = open_model("model", "cpu")
    found, whole = (opened.restore(name).state for name in ("s", "whole"))
    assert found.position == whole.position
    assert found.kept is not None
    assert whole.kept is not None
    assert torch.equal(found.kept.position, whole.kept.position)


def test_a_session_that_keeps_others_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read, go_on = "read text --model model --quiet --no-control", "generate --model model --session"
    assert longread(f"{read} --save plain") == 0
    assert longread(f"{read} --save kept --kept-tokens {N}") == 0
    assert f"--kept-tokens is 8, and kept keeps {N}; leave" in refused(f"{go_on} kept --kept-tokens 8", capsys)
    assert "--kept-tokens is 8, and plain keeps none; leave" in refused(f"{go_on} plain --kept-tokens 8", capsys)
    assert "and kept keeps" in refused(f"{read} --session kept --kept-tokens 8", capsys)
    assert "and kept keeps" in refused(f"{read} --save kept --resume --kept-tokens 8", capsys)


def test_where_nothing_can_be_kept_one_sentence_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Transformer(tiny.config(attention="full", vocab_size=257))
    initialize(full, seed=0)
    save_model(home / "full", full, tiny.INNER, ByteTokenizer().fingerprint)
    ByteTokenizer().save(home / "full")
    for line in ("read text --model full", "evaluate model full --data text", "generate --model full --prompt a"):
        error = refused(f"{line} --kept-tokens {N}", capsys)
        assert f"--kept-tokens with full: model.kept_tokens is {N}; it goes with windowed attention" in error
    draft = "generate --model model --draft model --frozen --prompt a"
    assert "a verifier knows no kept tokens" in refused(f"{draft} --kept-tokens {N}", capsys)
    assert "--kept-tokens is about reading" in refused(f"estimate model --train 1 --kept-tokens {N}", capsys)
    assert longread(f"estimate model --kept-tokens {N}") == 0
    assert f"of that {N} tokens kept beyond the window" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "evaluate model --data text --max-tokens 257",
        "needle model --contexts 1024 --depths 0 --samples 1 --max-tokens 2",
        "questions model --data prose --contexts 2048 --choices 2 --questions 1",
        "judge model --judge other --data text --context 256 --documents 1",
    ],
)
def test_measurements_name_what_was_kept(home: Path, line: str) -> None:
    save_small_model(home / "other", seed=2)
    assert longread(f"{line} --json plain.json --quiet") == 0
    assert longread(f"{line} --json kept.json --quiet --kept-tokens {N}") == 0
    plain, kept = (Path(f"{name}.json").read_text() for name in ("plain", "kept"))
    assert f"model with {N} tokens kept" in kept
    assert "tokens kept" not in plain


def test_the_judge_may_not_be_a_writer_that_keeps_tokens(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"judge model --judge model --data text --context 256 --kept-tokens {N}"
    assert "the judge model is the writer model" in refused(line, capsys)


def test_a_server_keeps_tokens_in_every_session(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def serve(service: Any, listener: Any) -> None:
        listener.close()
        with service.engine as engine:
            sid = engine.create().id
            engine.append(sid, open_model("model", "cpu").tokenizer.encode(TEXT)).result(60)
            served.append((service.name, service.config.kept_tokens, engine.info(sid).nbytes))

    monkeypatch.setattr("longread.server.serve", serve)
    assert longread("serve --model model --port 0") == 0
    assert longread(f"serve --model model --port 0 --kept-tokens {N}") == 0
    (plain, none, small), (name, tokens, large) = served
    assert (plain, none, name, tokens) == ("model", 0, "model", N)
    assert large > small
