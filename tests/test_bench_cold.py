"""`longread bench first-read first-token`: what a fresh process does first, split into its parts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longread.bench import Case, Machine, Outcome, cold, gate, markdown, plan, prefill, run_cases
from longread.bench.plots import bench_charts
from longread.cli import main
from longread.config import UserError
from longread.inner_loop import read
from longread.loading import boxed_models

CPU = torch.device("cpu")
READ = ["first", "next", "first, nothing compiled", "next, nothing compiled"]
TOKEN = ["import", "open", "read", "write", "all, nothing compiled"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gates, a machine that is known, and no process but for the first token; one is tested with a first step."""
    for name, value in {"_VOCABULARY": 100, "_WIDTH": 64, "_MINI_BATCH": 32, "_TOKENS": 96}.items():
        monkeypatch.setattr(gate, name, value)
    monkeypatch.setattr("longread.bench.run.measure_machine", lambda device: Machine("one", "product", 1e11, 1e10))
    monkeypatch.setattr(cold, "in_a_process", lambda work, *arguments: work(*arguments))


def test_the_command_measures_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plots = tmp_path / "rows.json", tmp_path / "plots"
    arguments = ["bench", "first-read", "first-token", "--device", "cpu", "--sizes", "toy", "--methods", "e2e"]
    assert main([*arguments, "--contexts", "64", "--json", str(path), "--plots", str(plots)]) == 0
    page = capsys.readouterr().out
    reading, token = json.loads(path.read_text())
    assert (reading["measure"], reading["size"], reading["unit"]) == ("first_read_s", "toy", "s")
    assert list(reading["parts"]) == READ
    assert reading["value"] == reading["parts"]["first"] > 0
    assert (token["measure"], token["size"], token["context"]) == ("first_token_s", "longread-small", 64)
    assert list(token["parts"]) == TOKEN
    assert min(token["parts"].values()) > 0
    assert token["value"] == pytest.approx(sum(token["parts"][name] for name in TOKEN[:4]), abs=0.01)
    assert {plot.name for plot in plots.iterdir()} == {"first-read.svg", "first-token.svg"}
    assert "## From the start of a process to the first token" in page
    assert main(["bench", "--from", str(path)]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("| toy")] == [
        line for line in page.splitlines() if line.startswith("| toy")
    ]


def test_a_page_has_a_column_for_each_part_and_the_rate() -> None:
    case = Case("first-read", "swa", "135m", 32_768)
    row = cold.make_row(case, [2.0], 10.0, CPU, parts=dict(zip(READ, (2.0, 0.5, 8.0, 0.25), strict=True)))
    assert Case.of_row(row) == case
    page = markdown(Outcome(Machine("m", "p", 1e12, 1e10), [row]), command="c", hardware=None)
    line = next(line for line in page.splitlines() if line.startswith("| 135m |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4:] == ["2", "", "1", "2.00", "0.50", "8.00", "0.25", "16,384", "65,536", "10.0"]
    (chart,) = bench_charts([row, row | {"method": "e2e"}], "first-read")
    assert (chart.bars, list((chart.ticks or {}).values())) == (True, READ)
    assert [line.notes for line in chart.lines] == [["2", "0.5", "8", "0.25"]] * 2


def test_the_second_process_finds_what_the_first_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def reading(work: Any, *arguments: Any) -> Any:
        import os

        place = Path(os.environ["TRITON_CACHE_DIR"])
        found.append(" ".join(path.name for path in place.iterdir()))
        (place / f"kernel-{len(found)}").touch()
        return float(len(found)), 0.5, None

    monkeypatch.setattr(cold, "in_a_process", reading)
    row = cold.measure_first_read(Case("first-read", "e2e", "toy", 64), CPU)
    assert found == ["", "kernel-1"]
    assert row["value"] == row["parts"]["first"] == 2.0
    assert row["parts"]["first, nothing compiled"] == 1.0


def test_other_scores_than_in_pieces_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: Any, state: Any, tokens: Any, **settings: Any) -> Any:
        return read(model, state, tokens, **settings, learn=tokens.shape[1] > 32)

    monkeypatch.setattr(prefill, "read", forgetful)
    outcome = run_cases([Case("first-read", "e2e", "toy", 128)], CPU, repeats=1)
    assert outcome.red
    assert outcome.rows == []


def test_a_process_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no such device\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    outcome = run_cases([Case("first-token", "e2e", "longread-small", 64)], CPU, repeats=1)
    assert outcome.red
    assert outcome.failures[0][1].endswith("no such device")
    with pytest.raises(UserError, match="there is no model at nowhere"):
        cold.measure_first_token(Case("first-token", "e2e", "nowhere", 64), CPU)


def test_what_is_measured_where_nothing_is_said() -> None:
    on_gpu = plan(["first-read", "first-token"], gpu=True)
    assert on_gpu == [
        *(Case("first-read", method, "135m", 32_768) for method in ("e2e", "swa", "full")),
        *(Case("first-token", "e2e", name, 8192) for name in boxed_models()),
    ]
    assert plan(["first-token"], gpu=True, methods=["swa"]) == []
    (one,) = plan(["first-read"], gpu=True, sizes=["3b"], methods=["e2e"], contexts=[131_072, 8192])
    assert one == Case("first-read", "e2e", "3b", 8192)
    boxed = Case("first-token", "e2e", "longread-small", 8192)
    assert boxed.network.num_suffix_blocks > 0


@pytest.mark.parametrize("method", ["e2e", "swa", "full"])
def test_the_reader_of_135m_is_a_size_like_others(method: str) -> None:
    train, reading = Case("train", method, "135m", 8192, 8), Case("prefill", method, "135m", 131_072)
    assert train.network == reading.network
    assert train.config.batch_size == 8
    network = train.network
    assert (network.width, network.num_blocks, network.window_size, network.mini_batch_size) == (576, 30, 1024, 256)
    assert network.num_suffix_blocks == (8 if method == "e2e" else 0)
    assert network.window_of(0) == (None if method == "full" else 1024)
