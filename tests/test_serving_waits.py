"""`benchmarks/serving_waits.py`, on a tiny model: what it measures, compares, and calls wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving_waits
from benchmarks.served import Client
from longread.checkpoint import save_model
from longread.tokenizer import ByteTokenizer
from tests.server import INNER, make_model

PHASES = ["alone", "reading", "beside a reader", "four writers and a reader", "2 clients"]
CALLS = {"create", "get", "list", "label", "first token", "next token"}


def measured(home: Path, name: str, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the figures of a run of seconds."""
    model = home / "tiny"
    if not model.exists():
        model.mkdir()
        save_model(model, make_model(), INNER, ByteTokenizer.fingerprint)
        ByteTokenizer().save(model)
    short = ("--characters", "2000", "--rounds", "2", "--clients", "2", "--minutes", "0.03", "--threads", "1")
    status = serving_waits.main(["--model", str(model), "--out", str(home / name), *short, *options])
    return status, json.loads((home / name).read_text())


@pytest.mark.slow
def test_waits_are_measured_and_compared(tmp_path: Path) -> None:
    status, before = measured(tmp_path, "before.json")
    assert (status, before["problems"]) == (0, [])
    assert list(before["phases"]) == PHASES
    assert set(before["phases"]["alone"]["waits"]) == CALLS
    assert {"first token", "next token"} <= set(before["phases"]["beside a reader"]["waits"])
    for phase in before["phases"].values():
        for found in phase["waits"].values():
            assert found["n"] > 0
            assert 0 < found["p50"] <= found["p99"] <= found["max"]
    assert before["phases"]["reading"]["tokens_per_second"]["read"] > 0
    assert before["phases"]["four writers and a reader"]["tokens_per_second"]["written"] > 0
    assert before["memory"]["most"] >= before["memory"]["resident"] > 0
    assert not (tmp_path / "before.md").exists()
    assert measured(tmp_path, "after.json", "--before", str(tmp_path / "before.json"))[0] == 0
    page = (tmp_path / "after.md").read_text()
    assert f"Before: commit {before['commit']}" in page
    assert "| reading: tokens per second at least 0.95 times |" in page


@pytest.mark.slow
def test_a_session_at_a_wrong_position_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Client.call

    def lying(client: Client, method: str, path: str, body: Any = None) -> Any:
        answer = call(client, method, path, body)
        if method == "GET" and "position" in answer:
            answer["position"] += 1
        return answer

    monkeypatch.setattr(Client, "call", lying)
    status, found = measured(tmp_path, "wrong.json")
    assert status == 1
    assert any("a session is at" in problem for problem in found["problems"])


def test_a_longer_wait_is_an_aim_missed() -> None:
    def run(create: float, rate: float) -> dict[str, Any]:
        waits = {what: {"n": 9, "p50": 0.01, "p99": 0.02, "max": 0.03} for what in ("get", "next token")}
        waits["create"] = {"n": 1234, "p50": create, "p99": create, "max": create}
        phase = {"waits": waits, "tokens_per_second": {"read": rate, "written": 0.0}}
        return {
            "phases": {"reading": phase, "beside a reader": phase},
            "memory": {"resident": 100.0, "most": 200.0},
            "hardware": {"threads": 2},
            "versions": {"torch": "2"},
            "mini_batch_size": 128,
            "problems": [],
            **dict.fromkeys(("commit", "command", "date", "model"), "x"),
        }

    slow, fast = run(9.0, 1000.0), run(0.05, 900.0)
    page = serving_waits.write_page(fast, slow)
    assert "| beside a reader | create | 1,234 → 1,234 | 9,000 → 50.0 | 9,000 → 50.0 | 9,000 → 50.0 | 0.006 |" in page
    assert "| create beside a reader: p99 at most 100 ms | 50.0 | met |" in page
    assert "| reading: tokens per second at least 0.95 times | 0.900 | missed |" in page
    assert "| create beside a reader: p99 at most 100 ms | 9,000.0 | missed |" in serving_waits.write_page(slow, None)
