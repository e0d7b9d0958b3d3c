"""A page of experiments keeps the rows of earlier runs when a later archive comes alone."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from experiments.merging import covers, merged
from experiments.page import Table, with_tables
from experiments.pages import adapted, equal
from experiments.pages.__main__ import main
from experiments.run import add

from longread.recipes import recipe

EDGES = [0, *(1024 << i for i in range(6))]


def evaluation(loss: float) -> dict[str, Any]:
    """Of a reader whose frozen self is 0.5 above it."""

    def result(reading: str, nats: float) -> dict[str, Any]:
        score = {"nats_per_token": {"mean": nats}}
        bins = [{"start": a, "end": b, "score": score} for a, b in itertools.pairwise(EDGES)]
        return {"reading": reading, "loss": score, "by_position": bins}

    return {"results": [result("learning", loss), result("frozen", loss + 0.5)]}


def archive(path: Path, commit: str, losses: dict[str, float]) -> str:
    """As a run leaves it, of these jobs."""
    config = recipe("small", "e2e").as_dict()
    record = {"started": f"when {commit}", "hardware": {"gpus": ["a card"]}, "versions": {"torch": "2"}}
    with tarfile.open(path, "w:xz") as tar:
        add(tar, "state.json", json.dumps({"jobs": {}, "calls": [{"commit": commit}]}).encode())
        for job, loss in losses.items():
            add(tar, f"results/{job}/validation-32.json", json.dumps(evaluation(loss)).encode())
            add(tar, f"runs/{job}.json", json.dumps(record | {"config": config, "commit": None}).encode())
    return str(path)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`page(archives...)` makes it and gives its figures and its text."""

    def make(*archives: str) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["", *archives, "--date", "day", "--out", str(tmp_path / "out")])
        assert main() == 0
        folder = tmp_path / "out" / f"day_{adapted.SLUG}"
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results, (folder / "README.md").read_text(encoding="utf-8")

    return make


def test_a_later_archive_adds_its_rows_and_drops_none(page: Any, tmp_path: Path) -> None:
    first = archive(tmp_path / "1.tar.xz", "aaa", {"first-order": 3.25, "swa": 3.5, "dial-base": 4.0})
    later = archive(
        tmp_path / "2.tar.xz", 10 * "bbbb", {"first-order": 3.125, "dial-suffix-4": 4.5, "first-order-s1": 3.0}
    )
    _, text = page(first)
    assert "Runs, and" not in text
    (tmp_path / "out" / f"day_{adapted.SLUG}" / "README.md").write_text(text.replace("What came out", "By hand"))
    results, text = page(later)
    assert list(results["models"]) == ["SWA twin", "first-order", "first-order, seed 1"], "in the order of the page"
    assert list(results["dials"]) == ["base", "4 blocks learn"]
    assert results["models"]["first-order"]["learning"]["0–1K"] == 3.125
    assert results["run of"]["models"] == {"SWA twin": 0, "first-order": 1, "first-order, seed 1": 1}
    assert results["run of"]["dials"] == {"base": 0, "4 blocks learn": 1}
    assert [run["commit"] for run in results["runs"]] == ["aaa", 10 * "bbbb"]
    ((run, row),) = results["earlier"]["models"]["first-order"]
    assert (run, row["learning"]["0–1K"]) == (0, 3.25)
    assert "By hand" in text
    assert "| base | 4.000 |" in text
    assert "| 4 blocks learn | 4.500 |" in text
    assert "| first-order, learning | 1 | 3.250 | 2 | 3.125 | −0.125 |" in text
    assert "| 1 | aaa | when aaa | 1 × a card | 2 | models: SWA twin; dials: base |" in text
    rows = "models: first-order, first-order, seed 1; dials: 4 blocks learn"
    assert f"| 2 | {9 * 'b'} | when {40 * 'b'} | 1 × a card | 2 | {rows} |" in text
    assert (results, text) == page(later), "what is there is not added again"
    assert (results, text) == page(first, later), "nor does what was replaced come back"


def test_both_archives_at_once_are_two_runs(page: Any, tmp_path: Path) -> None:
    first = archive(tmp_path / "1.tar.xz", "aaa", {"swa": 3.5})
    later = archive(tmp_path / "2.tar.xz", "bbb", {"first-order": 3.25})
    results, _ = page(first, later)
    assert results["run of"]["models"] == {"SWA twin": 0, "first-order": 1}


def test_a_row_that_says_less_does_not_take_the_place_of_one_that_says_more() -> None:
    rows = {"t": ("x", "y")}
    before = merged({}, {"t": {"x": {"a": 1, "b": {"c": 2}}}}, {"commit": "1"}, rows)
    for less in ({"a": 9}, {"a": 9, "b": {}}, {"a": 9, "b": 3}):
        after = merged(before, {"t": {"x": less, "y": 5}}, {"commit": "2"}, rows)
        assert after["t"] == {"x": {"a": 1, "b": {"c": 2}}, "y": 5}
        assert after["run of"]["t"] == {"x": 0, "y": 1}
    assert merged(before, {"t": {"x": {"a": 9}}}, {"commit": "2"}, rows) == before, "a run of which nothing is kept"
    more = merged(before, {"t": {"x": {"a": 1, "b": {"c": 2, "d": 3}}}}, {"commit": "1"}, rows)
    assert more["earlier"] == {}, "the same run, further on"
    assert covers([1], [2])
    assert not covers({}, {"a": 1})


def test_seeds_at_equal_operations_join_and_say_how_far_they_moved() -> None:
    kinds = ("books", "code")
    names = (*equal.NAMES.values(),)

    def figures(losses: dict[str, dict[str, float]]) -> dict[str, Any]:
        empty = {f"{name}, {kind}": {equal.READ: {}, equal.FROZEN: {}} for name in names for kind in kinds}
        again = {f"{equal.AGAIN}, {kind}": {} for kind in kinds}
        return empty | again | {"first-order, books": {equal.READ: losses, equal.FROZEN: {}}}

    before, new = figures({"0": {"1": 3.5, "8": 3.25}}), figures({"0": {"1": 3.625}, "2": {"8": 3.0}})
    results = equal.merge(before, new, {})
    expected = {"0": {"1": 3.625, "8": 3.25}, "2": {"8": 3.0}}
    assert results["first-order, books"][equal.READ] == expected
    assert results[f"{equal.AGAIN}, books"] == {"first-order, seed 0": {"1": 0.125}}
    assert before["first-order, books"][equal.READ] == {"0": {"1": 3.5, "8": 3.25}}


def test_a_table_that_a_page_lacks_follows_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "# Title\n\nA:\n\n|  | a |\n|---|--:|\n| x | 1 |\n\nText.\n\nC:\n\n|  | c |\n|---|--:|\n| z | 3 |\n"
    )
    tables = [Table(f"{name}:", ["", name.lower()], [["x", "9"]]) for name in "ABCD"]
    expected = "# Title\n\n{}\n\n{}\n\nText.\n\n{}\n\n{}\n".format(*(table.text for table in tables))
    assert with_tables(page, tables, add=True) == expected
    page.write_text(expected)
    assert with_tables(page, tables) == expected
