"""The experiment on thinking agents, rehearsed: jobs in parts, stopped and gone on with, and the page of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from experiments import thinking
from experiments.page import as_stored, with_tables
from experiments.pages import thinking as page


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["experiments.thinking", *map(str, arguments)])
    monkeypatch.setattr("experiments.thinking.signal.signal", lambda *_: None)
    return thinking.main()


def rehearse(monkeypatch: pytest.MonkeyPatch, work: Path, name: str, *options: object) -> int:
    return call(monkeypatch, "run", "--out", work, "--rehearse", "--device", "cpu", "--only", name, *options)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two jobs left; the curve of the second as long as that of a long training."""
    work = tmp_path_factory.mktemp("thinking")
    for name in ("main", "random"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert rehearse(monkeypatch, work, name) == 0
    long = json.loads((work / "random.json").read_text())
    for row, iteration in zip(long["curve"], page.BUDGETS, strict=True):
        row["iteration"] = iteration
    (work / "random.json").write_text(json.dumps(long))
    return work


def test_every_job_belongs_to_one_part() -> None:
    names = list(thinking.jobs())
    assert sorted(name for part in range(4) for name in names[part::4]) == sorted(names)
    assert names[0] == "main"


@pytest.mark.slow
def test_a_job_that_was_stopped_goes_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads((work / "main.json").read_text())
    moments = iter(range(100))
    monkeypatch.setattr(thinking.time, "monotonic", lambda: float(next(moments)))  # a second goes by at every look
    assert rehearse(monkeypatch, tmp_path, "main", "--seconds", 30) == 75
    assert (tmp_path / "checkpoints" / "main.safetensors").exists()
    monkeypatch.undo()
    assert rehearse(monkeypatch, tmp_path, "main") == 0
    assert not (tmp_path / "checkpoints" / "main.safetensors").exists()
    again = json.loads((tmp_path / "main.json").read_text())
    for changing in ("seconds", "curve"):
        whole.pop(changing), again.pop(changing)
    assert again == whole


def test_a_job_trains_for_each_choice_of_what_is_withheld(work: Path) -> None:
    found = json.loads((work / "main.json").read_text())
    assert found["withheld"] == ["abc", "abd", "acd", "bcd"]
    assert set(found["world models"]) == {"3", "6"}


def test_the_page_shows_what_the_jobs_left(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "page", work, tmp_path / "page") == 0
    text = (tmp_path / "page" / "README.md").read_text()
    stored = {"results": json.loads((tmp_path / "page" / "results.json").read_text())}
    tables = list(page.tables(stored))
    assert len(tables) == 5
    assert all(table.text in text for table in tables)
    assert with_tables(tmp_path / "page" / "README.md", tables) == text
    drawn = {"training.svg", "trials.svg", "models.svg", "thought.svg"}
    assert {path.name for path in (tmp_path / "page").glob("*.svg")} == drawn
    assert all((tmp_path / "page" / name).read_text().startswith("<svg") for name in drawn)
    main = stored["results"]["main"]
    row = next(row for row in tables[0].rows if row[0] == page.AT_ONCE)
    assert row[1] == page.mean(main["success"][page.AT_ONCE]["withheld"])


def test_an_interval_is_that_of_student() -> None:
    assert page.mean([0.1, 0.2, 0.3, 0.4]) == "0.250 ± 0.205"  # 3.182 · 0.1291 / 2
    assert page.mean([0.5]) == "0.500"
    assert page.mean([]) == "–"


def test_what_was_not_run_has_no_table(work: Path) -> None:
    stored: dict[str, Any] = as_stored({"random": json.loads((work / "random.json").read_text())})
    assert [table.caption.partition(",")[0] for table in page.tables({"results": stored})] == [
        "Success on withheld combinations by selection",
        "Long training",
    ]
    assert list(page.tables({"results": {}})) == []
