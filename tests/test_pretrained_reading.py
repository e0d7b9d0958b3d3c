"""A model that was converted and not adapted reads frozen, says so, and learns if it is asked to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from longread.checkpoint import load_model, save_model
from longread.cli import main
from longread.loading import open_model
from longread.server.app import create_app
from longread.tokenizer import copy_tokenizer
from tests.pretrained_models import convert, make, save
from tests.server import make_service

TEXT = "a text that is read, and read on, until it ends. " * 3


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    assert convert(save(make("llama"), home / "source"), home / "reader", "--mini-batch", "16") == 0
    (home / "text.txt").write_text(TEXT)
    return home / "reader"


def test_sessions_are_frozen_unless_asked(reader: Path) -> None:
    opened = open_model(reader, "cpu")
    assert not opened.learns
    assert not load_model(reader).learns
    session, learning = opened.session(), opened.session(learn=True)
    assert (session.learn, learning.learn) == (False, True)
    session.read(TEXT)
    learning.read(TEXT)
    assert (session.steps, learning.steps) == (0, len(TEXT) // 16)


def test_one_that_is_trained_learns(reader: Path, tmp_path: Path) -> None:
    """Whoever saves a model after training says nothing, and it learns."""
    loaded = load_model(reader)
    save_model(tmp_path / "adapted", loaded.model, loaded.inner, loaded.metadata["tokenizer_fingerprint"])
    assert loaded.tokenizer_path
    copy_tokenizer(loaded.tokenizer_path, tmp_path / "adapted")
    opened = open_model(tmp_path / "adapted", "cpu")
    assert opened.learns
    assert opened.session().learn
    assert not opened.session(learn=False).learn


def rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], str]:
    """Which readings a command's figures have, and what it said."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--device", "cpu", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    return [one["reading"] for one in json.loads(out)["results"]], err


def test_commands_say_so_and_can_let_it_learn(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = reader.parent / "text.txt"
    for command in (["read", text, "--model", reader], ["evaluate", reader, "--data", text]):
        found, said = rows(capsys, *command)
        assert found == ["frozen"]
        assert "longread: reader was converted and not adapted, so it reads frozen; `longread train` adapts it" in said
        assert "converted" not in rows(capsys, *command, "--quiet")[1]
        found, said = rows(capsys, *command, "--learn")
        assert found == ["learning", "frozen"]
        assert "converted" not in said


def test_generating(reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(reader), "--prompt", TEXT, "--max-tokens", "3", "--seed", "0"]
    said = "so it reads frozen"
    for options, learns, told in (([], False, True), (["--learn"], True, False), (["--frozen"], False, False)):
        path = tmp_path / "a.session"
        assert main([*command, *options, "--device", "cpu", "--save", str(path), "--force"]) == 0
        assert (said in capsys.readouterr().err) == told
        session = open_model(reader, "cpu").restore(path)
        assert (session.learn, session.steps > 0) == (learns, learns)
    assert main([*command, "--session", str(path), "--learn", "--device", "cpu", "--save", str(path)]) == 0
    assert open_model(reader, "cpu").restore(path).learn


def test_a_session_says_itself_whether_it_learns(
    reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that has learned goes on learning, and nobody says that it is frozen."""
    text, model = reader.parent / "text.txt", ["--model", reader]
    for learning in (["--learn"], []):
        path = tmp_path / f"{len(learning)}.session"
        rows(capsys, "read", text, *model, "--save", path, *learning)
        found, said = rows(capsys, "read", text, *model, "--session", path, "--no-control")
        assert found == ["learning" if learning else "frozen"]
        assert ("so it reads frozen" in said) != bool(learning)
        command = ["generate", *model, "--session", path, "--prompt", "A", "--max-tokens", "3", "--device", "cpu"]
        assert main([str(word) for word in command]) == 0
        assert ("so it reads frozen" in capsys.readouterr().err) != bool(learning)


def test_the_mark_changes_no_fingerprint(reader: Path, tmp_path: Path) -> None:
    """A session that was read with a model goes on with it once nothing but the mark is different."""
    loaded = load_model(reader)
    inner = dataclasses.replace(loaded.inner, lr=1.0)
    save_model(tmp_path / "same", loaded.model, inner, None)
    assert load_model(tmp_path / "same").fingerprint == loaded.fingerprint
    assert "learns" not in json.loads((tmp_path / "same" / "config.json").read_text())


@pytest.mark.parametrize("learn", [False, True])
def test_a_server_reads_as_the_model_was_trained_to(learn: bool, tmp_path: Path) -> None:
    service = make_service(tmp_path)
    service.learn = learn
    with TestClient(create_app(service), base_url="http://localhost") as client:

        def learns(**said: object) -> bool:
            return client.post("/v1/sessions", json=said).json()["learn"]

        def logprob(**said: object) -> float:
            body = {"model": "tiny", "prompt": TEXT, "max_tokens": 1, "temperature": 0, "logprobs": 1, **said}
            return client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"][0]

        assert (learns(), learns(learn=None), learns(learn=not learn)) == (learn, learn, not learn)
        assert logprob() == logprob(learn=learn) != logprob(learn=not learn)
