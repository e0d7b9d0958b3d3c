"""Judging in a fork: what the tests of a tree run, and whether one of them notices a fault.

A child has torch and pytest from its parent and imports the tree itself, so a fault of an import is a fault as well.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

MEMORY = 24 << 30  # bytes of address space of a child: a fault may ask for the square of what there is
OPTIONS = ["-q", "-x", "-Wignore", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
OPTIONS += ["-o", "addopts=", "-m", "not slow and not gpu and not browser"]


@dataclass
class Ran:
    """A test without faults: how it ended, its seconds, and for each module the lines of its call and of its set-up."""

    test: str
    passed: bool
    seconds: float
    lines: dict[str, list[int]]


class Watch:
    """A plugin that notes which lines of the modules each test runs; lines of imports and fixtures count for a file."""

    def __init__(self, modules: dict[str, str], part: int, parts: int) -> None:
        self.modules, self.part, self.parts = modules, part, parts
        self.ran: dict[str, Ran] = {}
        self.shared: dict[str, set[int]] = defaultdict(set)
        self._lines = self.shared

    def start(self) -> None:
        sys.settrace(self._enter)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        module = self.modules.get(frame.f_code.co_filename)
        if module is None:
            return None
        lines = self._lines[module]

        def at(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            lines.add(frame.f_lineno)
            return at

        lines.add(frame.f_lineno)
        return at

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cut = [len(items) * i // self.parts for i in (self.part, self.part + 1)]
        items[:] = items[slice(*cut)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._lines = defaultdict(set)
        self.start()  # a test may have ended the tracing
        try:
            return (yield)
        finally:
            lines = {module: sorted(found) for module, found in self._lines.items()}
            self.ran[item.nodeid] = Ran(item.nodeid, False, 0.0, lines)
            self._lines = self.shared

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.ran[report.nodeid].passed = report.passed
            self.ran[report.nodeid].seconds = report.duration


class Choose:
    """A plugin that runs the chosen tests in the chosen order and keeps the name of the first that failed."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


class Replaced(importlib.machinery.SourceFileLoader):
    """Gives a module another source than its file has."""

    code: CodeType

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class Instead:
    """Finds one module, with another source."""

    def __init__(self, module: str, path: Path, source: bytes) -> None:
        self.module, self.path = module, path
        self.code = compile(source, str(path), "exec", dont_inherit=True)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        loader = Replaced(name, str(self.path))
        loader.code = self.code
        within = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=loader, submodule_search_locations=within)


def _enter_tree(tree: Path) -> None:
    """As if Python had been started there: what is imported from now on is the tree's."""
    for name in [name for name in sys.modules if name.split(".")[0] in {"tests", "longread", "benchmarks"}]:
        del sys.modules[name]
    sys.path[:] = [str(tree / "src"), str(tree), *(path for path in sys.path if path not in {"", os.getcwd()})]
    os.chdir(tree)
    sys.dont_write_bytecode = True
    with contextlib.suppress(ImportError):
        from hypothesis import settings

        settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
        settings.load_profile("mutants")


def watch(tree: Path, file: str, modules: dict[str, str], part: int, parts: int) -> dict[str, Any]:
    """Runs one part of a test file without faults. `modules`: from the paths of source files to their names."""
    _enter_tree(tree)
    watching = Watch(modules, part, parts)
    watching.start()
    with tempfile.TemporaryDirectory() as scratch:
        options = [option for option in OPTIONS if option != "-x"]
        status = pytest.main([*options, "--basetemp", f"{scratch}/t", str(tree / file)], plugins=[watching])
    sys.settrace(None)
    return {
        "status": int(status),
        "ran": [vars(ran) for ran in watching.ran.values()],
        "shared": {module: sorted(lines) for module, lines in watching.shared.items()},
    }


def judge(tree: Path, module: str, path: Path, source: bytes, tests: list[list[str]]) -> dict[str, Any]:
    """Runs `tests`, a list for each test file, on a tree in which `module` has `source`, until one of them fails."""
    _enter_tree(tree)
    sys.meta_path.insert(0, Instead(module, path, source))  # type: ignore[arg-type]
    for chosen in tests:
        choose = Choose(chosen)
        with tempfile.TemporaryDirectory() as scratch:
            file = tree / chosen[0].split("::")[0]
            status = pytest.main([*OPTIONS, "--basetemp", f"{scratch}/t", str(file)], plugins=[choose])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return {"status": "killed", "by": choose.failed or str(chosen[0].split("::")[0])}
    return {"status": "survived"}


@dataclass
class Task:
    """What a child does; its answer, a dict, is given to `then`. It may take `seconds` of a core, and ten times as long
    beside others; then it is killed and answers `late`."""

    run: Callable[[], dict[str, Any]]
    then: Callable[[dict[str, Any]], None]
    seconds: float
    late: dict[str, Any]


def in_children(tasks: Iterable[Task], jobs: int, deadline: float, log: Path) -> bool:
    """Runs tasks in forks, `jobs` at a time. False: the deadline passed first, and what ran then is given up."""
    waiting, running = iter(tasks), {}
    with tempfile.TemporaryDirectory() as scratch:
        more = True
        while more or running:
            while more and len(running) < jobs:
                task = next(waiting, None)
                if task is None:
                    more = False
                    break
                answer = Path(scratch) / str(time.monotonic_ns())
                running[_fork(task, answer, log)] = (task, answer, time.monotonic())
            if time.time() > deadline:
                for child in running:
                    _kill(child)
                return False
            _collect(running)
            time.sleep(0.01)
    return True


def _collect(running: dict[int, tuple[Task, Path, float]]) -> None:
    for child, (task, answer, started) in list(running.items()):
        seconds = time.monotonic() - started
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and seconds < 10 * task.seconds:
            continue
        if not done or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            found = task.late
        else:
            found = json.loads(answer.read_text()) if answer.exists() else {"status": "killed", "by": f"exit {status}"}
        _kill(child, waited=bool(done))
        answer.unlink(missing_ok=True)
        del running[child]
        task.then(found | {"seconds": round(seconds, 2)})


def _kill(child: int, *, waited: bool = False) -> None:
    """The child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not waited:
        os.waitpid(child, 0)


def _fork(task: Task, answer: Path, log: Path) -> int:
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    try:
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(task.seconds), math.ceil(task.seconds) + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        try:
            found = task.run()
        except Exception as error:  # not a test's: pytest keeps those
            traceback.print_exc()
            found = {"status": "error", "by": repr(error)}
        aside = answer.with_suffix(".aside")
        aside.write_text(json.dumps(found))
        aside.rename(answer)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0 if answer.exists() else 1)
