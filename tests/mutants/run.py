"""A run over one tree: which tests run which lines, then a verdict on every fault, written down as it comes."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .faults import Fault, faults
from .judge import Task, in_children, judge, watch
from .reasons import Reasons, reason_of
from .since import source_at, still_there, unchanged

WATCHING = 500.0  # seconds for one part of a test file
SAVED_EVERY = 50  # verdicts


class Run:
    """Files under `tree`, as `targets` names them; `out` holds what is known so far."""

    def __init__(self, tree: Path, targets: Path, out: Path, budget: float, commit: str, tests: str = "") -> None:
        self.tree, self.out, self.budget, self.commit = tree, out, budget, commit
        self.log = out.with_suffix(".log")
        self.source = tree / "src"
        self.tests_of: dict[str, list[str]] = {}
        wanted = tomllib.loads(targets.read_text())
        self.patience = wanted["patience"]
        for group in wanted["group"]:
            self._add(group["files"], group["tests"], group.get("without", []))
        for file, named in self.tests_of.items():
            self.tests_of[file] = [test for test in named if any(part in test for part in tests.split(","))]
        self.tests = tests
        self.state = self._begun(targets)
        self.lines: dict[str, Any] = {}

    def _add(self, files: list[str], tests: list[str], without: list[str]) -> None:
        package = self.source / "longread"
        left_out = {path for pattern in without for path in package.glob(pattern)}
        named = [
            path.relative_to(self.tree) for pattern in tests for path in sorted((self.tree / "tests").glob(pattern))
        ]
        for pattern in files:
            for path in sorted(package.glob(pattern)):
                if path not in left_out:
                    self.tests_of[str(path.relative_to(self.tree))] = list(dict.fromkeys(map(str, named)))

    def _begun(self, targets: Path) -> dict[str, Any]:
        """What an earlier call found about the same files, or an empty record."""
        digest = hashlib.sha256(targets.read_bytes())
        for path in sorted([*self.source.rglob("*.py"), *(self.tree / "tests").rglob("*.py")]):
            digest.update(path.read_bytes())
        if self.out.exists():
            state = json.loads(self.out.read_text())
            if state["digest"] != digest.hexdigest():
                sys.exit(f"{self.out} holds results of other files; name another with --out")
            return state
        torch = sys.modules.get("torch")
        machine = {"python": platform.python_version(), "torch": getattr(torch, "__version__", None)}
        return {"digest": digest.hexdigest(), "commit": self.commit or commit_of(self.tree), **machine, "faults": {}}

    def take(self, earlier: dict[str, Any], reasons: Reasons) -> None:
        """Takes over what another run found about faults in functions that have not changed since. What was killed is
        taken as killed while the test that did it is there; what survived is judged again, unless a reason says why."""
        about = {name: earlier.get(name) for name in ("python", "torch")}
        about |= Counter(found["status"] for found in earlier["faults"].values())
        self.state.setdefault("taken", {})[earlier["commit"]] = about
        for file in self.tests_of:
            then, now = source_at(self.tree, earlier["commit"], file), (self.tree / file).read_bytes()
            for was, fault in unchanged(then, now):
                found = earlier["faults"].get(key(file, was))
                known = self.known.get(key(file, fault), {})
                if found is None or known.get("status") == "killed" or (known and "since" in found):
                    continue
                if found["status"] == "survived" or still_there(self.tree, found["by"]):
                    told = {"line": fault.line, "since": found.get("since", earlier["commit"])}
                    reason = {"excused": True} if reason_of(reasons, found | {"file": file})[1] else {}
                    self.known[key(file, fault)] = found | told | reason

    def go(self, only: str, shard: tuple[int, int], again: bool, jobs: int, deadline: float) -> bool:
        """Judges what has no verdict of this tree yet, and with `again` what survived without all of its tests; False
        if `deadline` passed first."""
        every = [(file, fault) for file in self.tests_of for fault in faults((self.tree / file).read_bytes())]
        self.state["places"] = len(every)
        self._save()
        done = {name for name, verdict in self.known.items() if not _open(verdict, again)}
        chosen = [(file, fault) for file, fault in every if only in file][shard[0] :: shard[1]]
        chosen = [(file, fault) for file, fault in chosen if key(file, fault) not in done]
        if not self._watched({test for file, _ in chosen for test in self.tests_of[file]}, jobs, deadline):
            return False
        print(f"{len(chosen)} faults to judge, {self.state['tests']} tests", flush=True)
        finished = in_children((self._task(file, fault) for file, fault in chosen), jobs, deadline, self.log)
        self._save()
        return finished

    @property
    def known(self) -> dict[str, dict[str, Any]]:
        """Verdicts by the key of a fault."""
        return self.state["faults"]

    def _watched(self, wanted: set[str], jobs: int, deadline: float) -> bool:
        """Runs the tests without faults, and keeps beside `out` which lines each ran."""
        beside = self.out.with_suffix(".lines.json")
        if beside.exists():
            found = json.loads(beside.read_text())
            self.lines = found["files"] if found["digest"] == self.state["digest"] else {}
        modules = {str(self.tree / file): module_of(file) for file in self.tests_of}
        parts = 1 if jobs < 8 else 4
        tasks = []
        for file in sorted(wanted - set(self.lines)):
            for part in range(parts):
                run = partial(watch, self.tree, file, modules, part, parts)
                tasks.append(Task(run, partial(self._watched_part, file), WATCHING, {"status": "late"}))
        finished = in_children(tasks, jobs, deadline, self.log)
        if finished:
            beside.write_text(json.dumps({"digest": self.state["digest"], "files": self.lines}))
            self.state["tests"] = sum(ran["passed"] for file in self.lines.values() for ran in file["ran"])
            self.state["tests_left_out"] = [*self._failing()]
        return finished

    def _watched_part(self, file: str, found: dict[str, Any]) -> None:
        known = self.lines.setdefault(file, {"ran": [], "shared": {}, "failed": []})
        known["ran"] += found.get("ran", [])
        for module, lines in found.get("shared", {}).items():
            known["shared"][module] = sorted({*known["shared"].get(module, []), *lines})
        if found["status"] not in (0, 1, 5):  # 5: no tests in this part
            known["failed"].append(found["status"])

    def _failing(self) -> Iterator[str]:
        for file, found in sorted(self.lines.items()):
            yield from (f"{file}: {status}" for status in found["failed"])
            yield from (ran["test"] for ran in found["ran"] if not ran["passed"])

    def _task(self, file: str, fault: Fault) -> Task:
        chosen, seconds, left = self._chosen(file, fault)
        path = self.tree / file
        mutant = fault.apply(path.read_bytes())
        run: Callable[[], dict[str, Any]] = partial(judge, self.tree, module_of(file), path, mutant, chosen)
        if not chosen:
            run = partial(dict, status="survived", by="no test runs it")
        late = {"status": "killed", "by": "time"}
        tests_left = {"tests_left": left} if left else {}
        return Task(run, lambda found: self._keep(file, fault, found | tests_left), self.patience + 5 * seconds, late)

    def _chosen(self, file: str, fault: Fault) -> tuple[list[list[str]], float, int]:
        """The tests that run the lines of the fault, those of a file together and quick ones first; how long they take;
        how many more there are than the budget allows."""
        module, span = module_of(file), set(range(fault.line, fault.last_line + 1))
        chosen: list[list[str]] = []
        seconds, left = 0.0, 0
        for test_file in self.tests_of[file]:
            found = self.lines[test_file]
            good = [ran for ran in found["ran"] if ran["passed"]]
            calls = [ran for ran in good if span & set(ran["lines"].get(module, ()))]
            everywhere = span & set(found["shared"].get(module, ()))
            names = []
            for ran in sorted(good if everywhere else calls, key=lambda ran: ran["seconds"]):
                if seconds + ran["seconds"] <= self.budget:
                    seconds += ran["seconds"]
                    names.append(ran["test"])
                else:
                    left += 1
            if names:
                chosen.append(names)
        return chosen, seconds, left

    def _keep(self, file: str, fault: Fault, found: dict[str, Any]) -> None:
        told = {name: value for name, value in asdict(fault).items() if name not in {"last_line", "start", "end"}}
        met = {"met": self.tests} if self.tests else {}  # of the tests, only these files
        self.known[key(file, fault)] = {"file": file, **told, **found, **met}
        if len(self.known) % SAVED_EVERY == 0:
            self._save()
            print(f"{len(self.known)} judged", flush=True)

    def _save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.out.with_suffix(".aside")
        aside.write_text(json.dumps(self.state, indent=0, sort_keys=True))
        aside.replace(self.out)

    def show(self) -> None:
        """A line for each folder."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for verdict in self.known.values():
            for row in (folder_of(verdict["file"]), "all"):
                counts[row][verdict["status"]] += 1
        print(f"{'':24}{'faults':>8}{'killed':>8}{'survived':>10}{'score':>8}")
        for row, count in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
            total = sum(count.values())
            print(f"{row:24}{total:8}{count['killed']:8}{count['survived']:10}{count['killed'] / total:8.1%}")
        for verdict in self.known.values():
            if verdict["status"] == "error":
                print(f"could not be judged: {verdict['file']}:{verdict['line']}, {verdict['by']}")
        for test in self.state.get("tests_left_out", ()):
            print(f"left out, as it fails without a fault: {test}")


def _open(verdict: dict[str, Any], again: bool) -> bool:
    """Whether the verdict may change."""
    carried = verdict["status"] == "survived" and "since" in verdict and not verdict.get("excused")
    left = verdict["status"] == "survived" and verdict.get("tests_left")
    return carried or verdict["status"] == "error" or bool(again and left)


def key(file: str, fault: Fault) -> str:
    """A name of a fault within a tree."""
    return f"{file}:{fault.line}:{fault.start}:{fault.kind}:{fault.after}"


def module_of(file: str) -> str:
    """`src/longread/ops/__init__.py`: `longread.ops`."""
    return file.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def folder_of(file: str) -> str:
    """The part of the library that a source file belongs to."""
    unit = Path(file).relative_to("src/longread")
    return unit.parts[0] if unit.parts[0] != "data" else f"data/{unit.stem}"


def commit_of(tree: Path) -> str:
    """The short name of the commit that a tree has checked out."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "no commit"
