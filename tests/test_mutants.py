"""The mutation tool: which faults it puts in, and that it tells apart what a test notices from what none does."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.faults import faults
from tests.mutants.judge import Task, in_children
from tests.mutants.reasons import known_reasons
from tests.mutants.report import cell, page, scores, survivors_of
from tests.mutants.run import _open
from tests.mutants.since import still_there, unchanged

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a = b + c", ["a = (b - c)"]),
        ("a = b < c <= d", ["a = (b <= c <= d)", "a = (b < c < d)"]),
        ("a = 3", ["a = (4)"]),
        ("a = -1", ["a = (-2)"]),
        ("a = 0.0, 0.5, True", ["a = (1.0), 0.5, True", "a = 0.0, (1.0), True", "a = 0.0, 0.5, (False)"]),
        ("a.b += c", ["pass", "a.b -= c"]),
        ("f(x)", ["pass"]),
        ("a = f(x, y=z)", ["a = (f(x))"]),
        ("a = x.sum()", ["a = (x.mean())"]),
        ("a = x.detach()", ["a = (x)"]),
        ("if a:\n    raise ValueError(f'{a + 1} is not {b + 1}')", ["if (not a):", "if a:\n    pass"]),
        ("a = not b", ["a = (b)"]),
        ("for i in a:\n    break", ["for i in a:\n    continue"]),
    ],
)
def test_a_place_has_these_faults(source: str, changed: list[str]) -> None:
    found = [fault.apply(source.encode()).decode() for fault in faults(source.encode())]
    assert len(found) == len(changed)
    for one, start in zip(found, changed, strict=True):
        assert start in one


@pytest.mark.parametrize(
    "source",
    [
        '"""A text of 3 words."""',
        "def f(a: Literal[3]) -> list[4]: ...",
        "warnings.warn(f'{a + 1} is too many', stacklevel=2)",
        "def __repr__(self):\n    return 'a' * (1 + 2)",
        "Name = dict[str, int] | None",
        "a = zip(b, c, strict=True)",
    ],
)
def test_what_no_test_should_pin_down_has_none(source: str) -> None:
    assert list(faults(source.encode())) == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of one file, whose test notices one fault of two; a second function has no test."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "src" / "longread" / "session").mkdir(parents=True)
    (tree / "src" / "longread" / "__init__.py").touch()
    (tree / "src" / "longread" / "session" / "__init__.py").write_text(
        "def larger(a, b):\n    return a if a > b else b\n\n\ndef lost(a):\n    return a + a\n"
        "\n\ndef once():\n    while True:\n        break\n"
    )
    (tree / "tests").mkdir()
    (tree / "tests" / "__init__.py").touch()
    (tree / "tests" / "test_session.py").write_text(
        "from longread.session import larger, once\n\n\ndef test_larger():\n    assert larger(3, 2) == 3\n"
        "\n\ndef test_once():\n    assert once() is None\n\n\ndef test_red():\n    assert not larger(2, 1)\n"
    )
    (tree / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['src']\n")
    (tree / "targets.toml").write_text(
        "patience = 1\npreload = ['hypothesis']\n[[group]]\nfiles = ['session/*.py']\ntests = ['test_session*.py']\n"
    )
    return tree


def run(tree: Path, *options: str) -> dict[str, dict[str, str]]:
    out = tree / "out.json"
    arguments = ["--tree", str(tree), "--targets", str(tree / "targets.toml"), "--out", str(out), "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", *arguments, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def halves(tree: Path) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """What is known after half of the faults, and after all."""
    return run(tree, "--shard", "0/2"), run(tree)


def test_a_fault_is_killed_by_a_test_that_runs_it(halves: tuple[dict[str, dict[str, str]], ...]) -> None:
    half, state = halves
    assert half["faults"].items() < state["faults"].items()  # what was known is kept
    assert state["tests"] == 2  # type: ignore[comparison-overlap]
    assert state["tests_left_out"] == ["tests/test_session.py::test_red"]  # type: ignore[comparison-overlap]
    found = {fault["before"] + " " + fault["after"]: fault for fault in state["faults"].values()}
    assert found["a > b (not a > b)"]["by"] == "tests/test_session.py::test_larger"  # type: ignore[index]
    assert found["a > b (a >= b)"]["status"] == "survived"  # type: ignore[index]
    assert found["a + a (a - a)"]["by"] == "no test runs it"  # type: ignore[index]
    assert found["break continue"]["by"] == "time"  # type: ignore[index]


def test_again_is_judged_what_survived_and_not_what_was_killed() -> None:
    """However many of its tests had not run."""
    survived, killed = ({"status": status, "tests_left": 3} for status in ("survived", "killed"))
    assert [_open(verdict, again) for verdict in (survived, killed) for again in (True, False)] == [True] + [False] * 3


def test_what_fails_outside_of_tests_is_no_kill(tmp_path: Path) -> None:
    found: list[dict[str, object]] = []

    def broken() -> dict[str, object]:
        raise FileNotFoundError("gone")

    tasks = [Task(broken, found.append, 60, {}), Task(lambda: os._exit(3), found.append, 60, {})]
    assert in_children(tasks, 1, time.time() + 3600, tmp_path / "log")
    assert [one["status"] for one in found] == ["error", "killed"]


def test_the_page_lists_what_survived_with_its_reason(halves: tuple[dict[str, dict[str, str]], ...]) -> None:
    _, state = halves
    reasons = {"src/longread/session/__init__.py": {"larger": {"a > b => (a >= b)": "equal numbers are the same"}}}
    text = page(state, state, reasons)
    assert "| session | " in text
    assert "equal numbers are the same" in text
    with pytest.raises(SystemExit, match="no fault that survived"):
        page(state, state, {"src/longread/session/__init__.py": {"larger": {"a => b": "slip"}}})


def defined(node: ast.AST, within: str = "") -> Iterator[str]:
    """All functions and classes, each with what it stands in before it."""
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = child.name if is_named else ""
        if name:
            yield within + name
        yield from defined(child, f"{within}{name}." if name else within)


def test_what_is_judged_and_what_has_a_reason_is_there() -> None:
    for group in tomllib.loads((ROOT / "tests" / "mutants" / "targets.toml").read_text())["group"]:
        for folder, names in (("src/longread", ("files", "without")), ("tests", ("tests",))):
            patterns = [pattern for name in names for pattern in group.get(name, ())]
            assert [pattern for pattern in patterns if not any((ROOT / folder).glob(pattern))] == []
    for file, functions in known_reasons().items():
        there = {"(module)", *defined(ast.parse((ROOT / file).read_bytes()))}
        assert functions.keys() <= there, (file, functions.keys() - there)


@pytest.mark.slow
def test_every_reason_is_of_a_fault() -> None:
    for file, functions in known_reasons().items():
        found = {(fault.function, f"{fault.before} => {fault.after}") for fault in faults((ROOT / file).read_bytes())}
        given = {(function, name) for function, reasons in functions.items() for name in reasons if name != "*"}
        assert given <= found, (file, given - found)


def test_functions_that_are_as_they_were_keep_their_verdicts() -> None:
    then = b"A = 1\n\nclass B:\n    C = 2\n    def f(self):\n        return 3\n\ndef g():\n    return 4\n"
    now = then.replace(b"A = 1", b'"""Longer."""\n\nA = 1').replace(b"return 3", b"return 5")
    assert {fault.before: fault.line - was.line for was, fault in unchanged(then, now)} == {"2": 2, "4": 2}
    within = b"def f():\n    def g():\n        return 3\n    return g\n"
    assert [fault.before for _, fault in unchanged(within, b"\n" + within)] == ["3"]
    assert not list(unchanged(within, within.replace(b"return g", b"return g()")))


def test_a_test_that_is_gone_kills_nothing(tree: Path) -> None:
    assert still_there(tree, "tests/test_session.py::test_larger[3-2]")
    assert still_there(tree, "time")
    assert not still_there(tree, "tests/test_session.py::test_smaller")
    assert not still_there(tree, "tests/test_gone.py::test_larger")


def test_an_earlier_run_is_taken_over_and_only_what_survived_is_judged_again(tree: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("out.*")))
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "A tree"]):
        subprocess.run([*git, *command], check=True)
    earlier = run(tree)
    (tree / "earlier.json").write_text(json.dumps(earlier))
    (tree / "tests" / "test_session_sums.py").write_text(
        "from longread.session import lost\n\n\ndef test_lost():\n    assert lost(3) == 6\n"
    )
    (tree / "out.json").unlink()
    state = run(tree, "--since", str(tree / "earlier.json"), "--tests", "sums")
    found = {fault["before"] + " " + fault["after"]: fault for fault in state["faults"].values()}
    assert found["a > b (not a > b)"]["since"] == earlier["commit"]  # type: ignore[index]
    assert found["a + a (a - a)"]["by"] == "tests/test_session_sums.py::test_lost"  # type: ignore[index]
    assert found["a > b (a >= b)"]["status"] == "survived"  # type: ignore[index]
    taken = sum("since" in fault for fault in state["faults"].values())
    assert taken > 1
    text = page(earlier, state, {})  # type: ignore[arg-type]
    assert f"\n{taken} faults are taken from the run before (Python {earlier['python']}, torch " in text
    survivors = len(survivors_of(state))  # type: ignore[arg-type]
    assert f"\n{survivors} of the survivors met only some of the tests here" in text
    kept = {name: value for name, value in earlier.items() if name != "faults"}
    kept |= {"commit": "0123abc", "scores": scores(earlier), "survivors": survivors_of(earlier)}  # type: ignore[dict-item, arg-type]
    text = page(kept, state, {})  # type: ignore[arg-type]
    assert cell(scores(earlier)["session"]) + " | " + cell(scores(state)["session"]) in text  # type: ignore[arg-type]
    assert f"\n{taken} faults are taken from a run of {earlier['commit']} (Python " in text
    whole = cell(scores(earlier)["all"]).replace(" |", ",")  # type: ignore[arg-type]
    assert f"of all faults of that tree had killed {whole}.\n" in text
    assert f"## The {survivors} that survive, {survivors} of them without a reason yet\n" in text
