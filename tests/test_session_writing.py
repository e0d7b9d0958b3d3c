"""Text that sessions write: that of the command line, and a session that has read what was shown."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
import torch

from longread.cli import main
from longread.config import UserError
from longread.loading import OpenModel, open_model
from longread.session import Session, text_of
from longread.speculative import Speculation
from longread.tokenizer import ByteTokenizer
from tests import tiny

PROMPT = "Once upon a time there was"
SETTINGS = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def opened() -> OpenModel:
    return open_model("longread-small", "cpu")


@pytest.fixture(scope="module")
def whole(opened: OpenModel) -> str:
    """What follows the prompt where nothing stops it."""
    return "".join(opened.session().write(PROMPT, **SETTINGS))  # type: ignore[arg-type]


def given(ids: Iterable[int]) -> Generator[int, None, None]:
    yield from ids


def test_a_character_waits_for_its_bytes() -> None:
    tokenizer = ByteTokenizer()
    session, ids = Session(tiny.make(), tiny.INNER), tokenizer.encode("naïve – ok")
    assert list(text_of(given(ids), tokenizer, [session])) == list("naïve – ok")
    assert "".join(text_of(given(ids[:3]), tokenizer, [session])) == "na\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("settings", [{"seed": 7}, {"seed": 7, "temperature": 0.8, "top_p": 0.9}])
def test_python_writes_what_the_command_line_writes(
    opened: OpenModel, capsys: pytest.CaptureFixture[str], settings: dict[str, float]
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert (
        main(["generate", "--model", opened.name, "--device", "cpu", "--max-tokens=16", "--prompt", PROMPT, *options])
        == 0
    )
    written = "".join(opened.session().write(PROMPT, max_tokens=16, **settings))  # type: ignore[arg-type]
    assert written
    assert capsys.readouterr().out == written + "\n"


def test_nothing_read_begins_a_text(opened: OpenModel) -> None:
    assert "".join(opened.session().write(max_tokens=4, seed=1))
    session = Session(opened.model, opened.inner)
    with pytest.raises(UserError, match="has no tokenizer"):
        session.write()


@pytest.mark.parametrize("begin", [0, 1, 9, 20, 31])
def test_after_a_stop_a_session_has_read_what_was_shown(opened: OpenModel, whole: str, begin: int) -> None:
    stop = whole[begin : begin + 6]
    session = opened.session()
    shown = "".join(session.write(PROMPT, stops=[stop], **SETTINGS))  # type: ignore[arg-type]
    assert shown == whole[: whole.index(stop)]
    assert opened.tokenizer.decode(session.recent) == PROMPT + shown
    again = opened.session()
    again.read(session.recent)
    assert session.position == again.position
    torch.testing.assert_close(session.score(" and"), again.score(" and"))


def test_a_drafter_goes_back_too(opened: OpenModel) -> None:
    whole = "".join(opened.session(learn=False).write(PROMPT, **SETTINGS))  # type: ignore[arg-type]
    verifier, drafter = opened.session(learn=False), opened.session()
    verifier.read(PROMPT)
    drafter.read(PROMPT)
    ids = Speculation(verifier, drafter).generate(24, temperature=0.0)
    shown = "".join(text_of(ids, opened.tokenizer, [verifier, drafter], stops=[whole[9:15]]))
    assert shown == whole[: whole.index(whole[9:15])]
    assert verifier.recent == drafter.recent
    assert opened.tokenizer.decode(verifier.recent) == PROMPT + shown


def test_what_was_written_until_it_is_closed_has_been_read(opened: OpenModel) -> None:
    session = opened.session()
    text = session.write(PROMPT, **SETTINGS)  # type: ignore[arg-type]
    shown = next(text) + next(text)
    text.close()
    assert opened.tokenizer.decode(session.recent).startswith(PROMPT + shown)
    assert session.position < 1 + len(opened.tokenizer.encode(PROMPT)) + 24


def test_a_stop_text_that_is_empty(opened: OpenModel) -> None:
    session = opened.session()
    with pytest.raises(UserError, match="a stop text is empty"):
        session.write(PROMPT, stops=["end", ""])
    assert session.position == 0


def test_a_saved_session_holds_what_was_shown(
    opened: OpenModel, whole: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", opened.name, "--device", "cpu", "--prompt", PROMPT, "--temperature", "0"]
    assert main([*command, "--stop", whole[9:15], "--save", str(tmp_path / "saved")]) == 0
    assert capsys.readouterr().out == whole[: whole.index(whole[9:15])] + "\n"
    assert (
        opened.tokenizer.decode(opened.restore(tmp_path / "saved").recent) == PROMPT + whole[: whole.index(whole[9:15])]
    )


def test_a_long_prompt_leaves_the_same_session(
    opened: OpenModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit: command line and Python read a prompt in the same pieces."""
    prompt = "He had been at sea for years, and nobody on the island knew his name.\n" * 20
    command = ["generate", "--model", opened.name, "--device", "cpu", "--prompt", prompt, "--max-tokens", "4"]
    assert main([*command, "--seed", "3", "--save", str(tmp_path / "saved")]) == 0
    session = opened.session()
    written = "".join(session.write(prompt, max_tokens=4, seed=3))
    assert session.position > 2 * opened.model.config.mini_batch_size
    assert capsys.readouterr().out == written + "\n"
    assert torch.equal(opened.restore(tmp_path / "saved").score(prompt), session.score(prompt))
