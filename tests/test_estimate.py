"""The arithmetic of memory, beside real sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

from longread.checkpoint import save_model
from longread.cli import main
from longread.cli.estimate import session_bytes
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests.server import INNER, M, make_model


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(["estimate", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:60].strip(): line[60:].strip() for line in lines}


def test_no_session_is_larger_and_some_are_as_large() -> None:
    session, sizes = Session(make_model(), INNER), []
    for _ in range(5 * M):
        session.read([1])
        sizes.append(session.nbytes)
    assert max(sizes) == session_bytes(session.model)


def test_a_3b_session_is_small_beside_full_attention(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "3b", "--memory", "141")
    assert found["one session, at any length"] == "3.86 GiB"
    assert found["keys and values of full attention at 131,072 tokens"] == "40.00 GiB"
    sessions = found["sessions that write at once in 141 GiB"]
    assert int(sessions) > 5 * int(found["texts of full attention that write at once in 141 GiB"])


def test_a_model_on_disk_can_be_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, make_model(), INNER, ByteTokenizer.fingerprint)
    found = figures(capsys, str(tmp_path), "--precision", "float32")
    assert found["one session, at any length"] == f"{session_bytes(make_model()) / 2**20:.2f} MiB"
    assert main(["estimate", str(tmp_path), "--memory", "-1"]) == 2
