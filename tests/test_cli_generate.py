"""Prompts from files, pipes and people; and a session that has read just what was shown, however writing ended."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from longread.cli import main
from longread.loading import OpenModel, open_model
from tests.forked import command

PROMPT = "Once upon a time there was"
GENERATE = ["generate", "--model", "longread-small", "--device", "cpu", "--max-tokens", "24", "--temperature", "0"]


@pytest.fixture(scope="module")
def opened() -> OpenModel:
    return open_model("longread-small", "cpu")


@pytest.fixture(scope="module")
def whole(opened: OpenModel) -> str:
    """What follows the prompt, as it is shown."""
    return "".join(opened.session().write(PROMPT, max_tokens=24, temperature=0)) + "\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def has_read(opened: OpenModel, name: str = "s") -> str:
    """The text of a session that has read no more than a window."""
    return opened.tokenizer.decode(opened.restore(name).recent)


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*GENERATE, *arguments]) == 0
    return capsys.readouterr().out


def test_a_prompt_comes_from_a_file_or_a_pipe(
    whole: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompt").write_text(PROMPT)
    assert written(capsys, "--prompt", PROMPT) == whole
    assert written(capsys, "--prompt-file", "prompt") == whole
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert written(capsys, "--prompt-file", "-") == whole
    monkeypatch.setattr(sys, "stdin", None)
    assert main([*GENERATE, "--prompt-file", "-"]) == 2
    assert "stdin is closed" in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_json_says_how_it_ended(whole: str, capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    more = ["--quiet"] if quiet else []
    assert main([*GENERATE, "--prompt", PROMPT, "--json", "-", *more]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["format"], found["text"] + "\n") == ("longread-generation/1", whole)
    assert (found["tokens"], found["finish_reason"]) == (24, "length")
    assert found["position"] == 1 + found["prompt_tokens"] + 24
    assert err == ("" if quiet else whole)
    assert main([*GENERATE, "--prompt", PROMPT, "--json", "-", "--quiet", "--stop", whole[9:15]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["finish_reason"]) == (whole[: whole.index(whole[9:15])], "stop")


def test_turns_go_on_with_one_session(
    opened: OpenModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty line lets the text go on; the end of the input ends it, and the session is kept."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("One line.\n\nAnother.\n"))
    out = written(capsys, "--interactive", "--max-tokens", "8", "--save", "s")
    session, answers = opened.session(), []
    between = ""
    for prompt in ("One line.\n", "", "Another.\n"):
        between = "\n" if prompt and answers and not answers[-1].endswith("\n") else ""
        answers.append("".join(session.write(between + prompt, max_tokens=8, temperature=0.0)))
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert opened.restore("s").recent == session.recent
    assert has_read(opened).startswith("One line.\n" + answers[0] + answers[1])


def test_an_interrupt_ends_an_answer_and_not_the_conversation(
    opened: OpenModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("One line.\nAnother.\n"))
    write, pieces = sys.stdout.write, list[str]()

    def interrupted(text: str) -> int:
        if text:  # asking for a line writes nothing
            pieces.append(text)
            if len(pieces) == 4:
                os.kill(os.getpid(), signal.SIGINT)
        return write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", interrupted)
        assert main([*GENERATE, "--interactive", "--save", "s"]) == 0
    first, second = "".join(pieces[:3]), "".join(pieces[4:-1])
    assert has_read(opened) == f"One line.\n{first}\nAnother.\n{second}"


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_was_not_shown_has_not_been_read(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    write, pieces = sys.stdout.write, list[str]()

    def interrupted(text: str) -> int:
        if len(pieces) == 5:
            os.kill(os.getpid(), getattr(signal, name))
        pieces.append(text)
        return write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", interrupted)
        assert main([*GENERATE, "--prompt", PROMPT, "--save", "s"]) == status
    assert has_read(opened) == PROMPT + "".join(pieces)
    assert len(pieces) == 5


def test_an_interrupt_while_a_token_is_computed_leaves_what_was_shown(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves a decoder half-changed: the session is made again from what was shown."""
    from longread.inner_loop import Decoder

    read, count = Decoder.read, [0]

    def interrupted(decoder: Decoder, *arguments: object) -> object:
        count[0] += 1
        found = read(decoder, *arguments)  # type: ignore[arg-type]
        if count[0] == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "read", interrupted)
        assert main([*GENERATE, "--prompt", PROMPT, "--save", "s"]) == 130
    shown = capsys.readouterr().out
    session = opened.session()
    session.read(PROMPT)
    session.read(opened.restore("s").recent[session.position :])
    assert has_read(opened) == PROMPT + shown
    assert opened.restore("s").score(" and").tolist() == pytest.approx(session.score(" and").tolist(), abs=1e-4)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_the_last_token_may_end_anywhere(
    opened: OpenModel, whole: str, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    """In the middle of what might have become a stop text: it is shown then, and has been read."""
    out = written(capsys, "--prompt", PROMPT, "--max-tokens", str(tokens), "--stop", whole[3:40] + "§", "--save", "s")
    assert has_read(opened) == PROMPT + out.removesuffix("\n")


def test_a_pipe_that_closes(opened: OpenModel, home: Path) -> None:
    """The reader takes ten bytes and goes: nothing that could not be written has been read."""
    writer = command(*GENERATE, "--prompt", PROMPT, "--save", "s")
    taken = os.read(writer.stdout.fileno(), 10)
    writer.stdout.close()
    assert writer.wait(300) == 0, writer.stderr.read()
    session = opened.restore("s")
    assert has_read(opened).startswith(PROMPT + taken.decode()[:1])
    assert session.position < 1 + len(opened.tokenizer.encode(PROMPT)) + 24
