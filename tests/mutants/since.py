"""What an earlier run says about a tree that has changed since: its verdicts on the functions that are as they were."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .faults import Fault, faults


def unchanged(then: bytes, now: bytes) -> Iterator[tuple[Fault, Fault]]:
    """Each fault of a file that stands in the same text as before, as it was and as it is."""
    was, is_now = _texts(then), _texts(now)
    earlier = _by_function(then)
    for function, found in _by_function(now).items():
        name = function
        while name not in is_now:  # within another function, whose text it is part of
            name = name.rpartition(".")[0]
        if was.get(name) == is_now[name]:
            yield from zip(earlier[function], found, strict=True)


def source_at(tree: Path, commit: str, file: str) -> bytes:
    """A file as it was, from Git; empty where it was not."""
    known = subprocess.run(["git", "-C", str(tree), "cat-file", "-e", commit], capture_output=True, check=False)
    if known.returncode:
        sys.exit(f"{tree} does not know the commit {commit} of an earlier run; give a checkout with its history")
    shown = ["git", "-C", str(tree), "show", f"{commit}:{file}"]
    return subprocess.run(shown, capture_output=True, check=False).stdout


def still_there(tree: Path, by: str) -> bool:
    """Whether a fault that was killed by this would meet it today: the time, a crash, or a test of this name."""
    file, _, test = by.partition("::")
    if not file.startswith("tests/"):
        return True
    path = tree / file
    return path.exists() and f"def {test.rpartition('::')[2].partition('[')[0]}" in path.read_text()


def _by_function(source: bytes) -> dict[str, list[Fault]]:
    found: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults(source):
        found[fault.function].append(fault)
    return found


def _texts(source: bytes) -> dict[str, str]:
    """The code of each function, without comments; of classes and the file, what is outside of functions."""
    texts: dict[str, str] = defaultdict(str)

    def enter(statements: list[ast.stmt], within: tuple[str, ...]) -> None:
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                enter(statement.body, (*within, statement.name))
                continue
            function = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
            name = ".".join((*within, statement.name) if function else within) or "(module)"  # type: ignore[attr-defined]
            texts[name] += ast.unparse(statement) + "\n"

    enter(ast.parse(source).body, ())
    return texts
