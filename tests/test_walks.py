"""Walks through the code stay short: to the first inner step, from a command and from a session; to a token, from a
request; and to a new session of an engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def walk(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.walks", "--walk", name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def test_from_a_session_to_its_step() -> None:
    found = walk("session")
    assert found["files outside ops"] <= 10
    assert found["twice"] == []


def test_from_the_command_to_the_first_step() -> None:
    found = walk("read")
    assert found["files outside"] <= 30
    assert found["files of other commands"] == found["imported"] == 0


def test_from_a_request_to_its_token() -> None:
    assert walk("completion")["files outside"] <= 18


def test_from_an_engine_to_its_session() -> None:
    assert walk("create")["segments"] <= 4
