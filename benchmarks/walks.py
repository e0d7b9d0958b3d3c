"""How far one has to walk to understand a call: files, functions and threads between where it enters and what it does.

    python -m benchmarks.walks [CHECKOUT ...] [--out FILE]

Prints a column for each checkout of the repository (default: this one). Each walk is taken on a CPU in a process of its
own, by `sys.setprofile` and `threading.setprofile`. A function counts when it is called, if it is written under
`src/longread`; bodies of modules and classes, lambdas and comprehensions do not count. A file counts when one of its
functions does.

read         `longread read FILE`, from the command line to the first call into `ops/clipped_sgd`: the first SGD step.
             Files of other commands are those in `cli/` that are called, or lie in a folder that is called, as another
             command is. The model is `model/`, `ops/` and `inner_loop/`. Files outside of `ops/` alone are counted
             too: each op is a folder, and all readings pass the same files of it.
session      `Session.read` of a mini-batch and the token after it, by a session that has read before, to the same call.
             A name occurs twice if the stack at that moment holds two functions of that name, or methods of two classes
             of that name; leading underscores do not tell names apart.
completion   `POST /v1/completions` for one token, to a server that has answered before, until the answer is there. A
             switch is a call in another thread than the call before it.
create       `Engine.create`, by an engine that has created before. A segment is a run of calls in one thread.

While threads are counted, the interpreter lock is given up only where a thread waits, so that switches are hand-overs.
Still they depend on what the system runs first: each count is the median of nine calls.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests.sources import doubled_classes, import_cycles, imported_files, sources

ROOT = Path(__file__).parent.parent
SGD = "ops/clipped_sgd/"
MODEL_UNITS = ("model/", "ops/", "inner_loop/")
COMMANDS = ("demo", "prepare", "train", "generate", "evaluate", "needle", "judge", "convert", "bench", "serve")
COMMANDS += ("estimate", "think", "questions")
REPEATS = 9
TEXT = "It was read once, and it was asked many times. " * 200


class Call(NamedTuple):
    """A call of a function of the library."""

    thread: int
    file: str
    """Relative to `src/longread`."""
    function: str
    """With the class before it."""


class Recorder:
    """Notes the library's calls in this thread and in all that are started later, while `recording`.

    Args:
        until: ends a recording at the first call in a file whose name begins so.
    """

    def __init__(self, until: str | None = None) -> None:
        import longread

        self.calls: list[Call] = []
        self.stack: list[Call] = []
        """At the call that ended the recording, the oldest first."""
        self._root = os.path.dirname(longread.__file__) + os.sep
        self._until, self._on = until, False
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Forgets what was noted, and notes what the block calls."""
        self.calls, self.stack, self._on = [], [], True
        try:
            yield
        finally:
            self._on = False

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not self._on or (call := self._call_of(frame)) is None:
            return
        self.calls.append(call)
        if self._until and call.file.startswith(self._until):
            self._on = False
            sys.setprofile(None)  # what follows need not be slow
            while frame is not None:
                self.stack = [at for at in [self._call_of(frame)] if at] + self.stack
                frame = frame.f_back  # type: ignore[assignment]

    def _call_of(self, frame: FrameType) -> Call | None:
        code = frame.f_code
        is_function = code.co_flags & 1 and not code.co_name.startswith("<")  # 1: CO_OPTIMIZED
        if not is_function or not code.co_filename.startswith(self._root):
            return None
        return Call(threading.get_ident(), code.co_filename.removeprefix(self._root), code.co_qualname)


def passed(calls: list[Call]) -> dict[str, int]:
    """Files and functions of some calls."""
    files = {call.file for call in calls}
    return {
        "files": len(files),
        "files outside ops": sum(not file.startswith("ops/") for file in files),
        "functions": len({call[1:] for call in calls}),
    }


def switches(calls: list[Call]) -> int:
    """Calls in another thread than the call before."""
    return sum(a.thread != b.thread for a, b in itertools.pairwise(calls))


def names_twice(stack: list[Call]) -> list[str]:
    """The names of functions and classes that a stack holds more than one of, with how many."""
    functions: dict[str, set[tuple[str, str]]] = defaultdict(set)
    classes: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for call in stack:
        *owner, name = call.function.replace("<locals>.", "").split(".")
        functions[name.strip("_")].add(call[1:])
        if owner:
            classes[owner[-1].strip("_")].add((call.file, owner[-1]))
    found = Counter({f"{name}()": len(places) for name, places in functions.items()})
    found += Counter({name: len(places) for name, places in classes.items()})
    return [f"{count} × {name}" for name, count in sorted(found.items()) if count > 1]


def walk_read() -> dict[str, Any]:
    """From the command line to the first SGD step."""
    recorder = Recorder(until=SGD)
    with tempfile.TemporaryDirectory() as folder, recorder.recording():
        book = Path(folder, "book.txt")
        book.write_text(TEXT)
        from longread.cli import main

        main(["read", str(book), "--model", "longread-small", "--device", "cpu"])
    _check(bool(recorder.stack), "the reading took no step")
    others = [f"longread.cli.{name}" for name in COMMANDS]
    files = {call.file for call in recorder.calls if Path(call.file).parts[0] == "cli"}
    imported = [name for name in sys.modules if ".".join(name.split(".")[:3]) in others]
    outside = {call.file for call in recorder.calls if not call.file.startswith(MODEL_UNITS)}
    called = [file for file in files if file.split("/")[1].removesuffix(".py") in COMMANDS]
    return {
        **passed(recorder.calls),
        "files outside": len(outside),
        "files of other commands": len(called),
        "imported": len(imported),
    }


def walk_session() -> dict[str, Any]:
    """From `Session.read` to the SGD step."""
    from longread.loading import open_model

    opened = open_model("longread-small", "cpu")
    ids = opened.tokenizer.encode(TEXT)[: opened.model.config.mini_batch_size + 1]
    opened.session().read(ids)
    session, recorder = opened.session(), Recorder(until=SGD)
    with recorder.recording():
        session.read(ids)
    _check(bool(recorder.stack), "the session took no step")
    return {**passed(recorder.calls), "twice": names_twice(recorder.stack)}


def walk_completion() -> dict[str, Any]:
    """One token by the route of OpenAI's."""
    from longread.cli import main

    recorder = Recorder()
    sys.setswitchinterval(10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[list[Call]] = []

    def ask() -> None:
        while threading.main_thread().is_alive():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 0.1).close()
                break
            time.sleep(0.2)
        body = json.dumps({"model": "longread-small", "prompt": "It was", "max_tokens": 1}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        for _ in range(REPEATS + 1):
            with recorder.recording(), urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                json.load(answer)
            found.append(recorder.calls)
            time.sleep(0.5)
        os.kill(os.getpid(), 2)

    threading.Thread(target=ask).start()
    main(["serve", "--port", str(port), "--model", "longread-small", "--device", "cpu"])
    walks = found[1:]
    _check(len(walks) == REPEATS, "the server did not answer")
    outside = [passed([call for call in calls if not call.file.startswith(MODEL_UNITS)]) for calls in walks]
    return {
        "files outside": round(statistics.median(found["files"] for found in outside)),
        "functions outside": round(statistics.median(found["functions"] for found in outside)),
        "files": round(statistics.median(passed(calls)["files"] for calls in walks)),
        "threads": round(statistics.median(len({call.thread for call in calls}) for calls in walks)),
        "switches": round(statistics.median(map(switches, walks))),
    }


def walk_create() -> dict[str, Any]:
    """`Engine.create`."""
    from longread.config import InnerConfig
    from longread.engine import Engine
    from longread.model import Transformer, initialize
    from longread.recipes import toy

    recorder = Recorder()
    sys.setswitchinterval(10)
    model = Transformer(toy().model)
    initialize(model, seed=0)
    segments, found = [], []
    with tempfile.TemporaryDirectory() as folder, Engine(model, InnerConfig(), directory=Path(folder)) as engine:
        engine.create()
        for _ in range(REPEATS):
            time.sleep(0.2)
            with recorder.recording():
                engine.create()
            segments.append(switches(recorder.calls) + 1)
            found.append(passed(recorder.calls))
    middle = {name: round(statistics.median(one[name] for one in found)) for name in ("files", "functions")}
    return {"segments": round(statistics.median(segments)), **middle}


WALKS: dict[str, Callable[[], dict[str, Any]]] = {
    "read": walk_read,
    "session": walk_session,
    "completion": walk_completion,
    "create": walk_create,
}


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise RuntimeError(reason)


def measured(checkout: Path) -> dict[str, Any]:
    """All that the page says of a checkout; the walks in processes of their own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    found: dict[str, Any] = {}
    for name in WALKS:
        command = [sys.executable, "-m", "benchmarks.walks", "--walk", name]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if run.returncode or not run.stdout:
            raise RuntimeError(f"the walk {name} of {checkout} failed:\n{run.stderr}")
        found[name] = json.loads(run.stdout.splitlines()[-1])
    package = checkout / "src" / "longread"
    files = sources(package)
    found["cycles"], found["doubled"] = len(import_cycles(imported_files(files))), len(doubled_classes(files))
    found["lines"] = Counter()
    for path in package.rglob("*"):
        if path.suffix in (".py", ".js", ".css", ".html") and path.is_file():
            parts = path.relative_to(package).parts
            unit = "server/page" if parts[:2] == ("server", "page") else parts[0].removesuffix(".py")
            found["lines"][unit] += path.read_text("utf-8").count("\n")
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return found


def page(columns: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = " | ".join(column["commit"] for column in columns)
    rule = "--:|" * len(columns)
    rows: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
        ("`longread read` to the first SGD step: files", lambda c: c["read"]["files"], "≤ 30"),
        ("functions", lambda c: c["read"]["functions"], ""),
        ("files outside `ops/`", lambda c: c["read"]["files outside ops"], ""),
        ("files outside the model", lambda c: c["read"]["files outside"], ""),
        ("of these files, other commands'", lambda c: c["read"]["files of other commands"], "0"),
        ("modules of other commands imported", lambda c: c["read"]["imported"], "0"),
        ("`Session.read` to the SGD step: files", lambda c: c["session"]["files"], "≤ 15"),
        ("functions", lambda c: c["session"]["functions"], ""),
        ("files outside `ops/`", lambda c: c["session"]["files outside ops"], ""),
        ("names twice in the stack", lambda c: ", ".join(c["session"]["twice"]) or "none", "none"),
        ("`/v1/completions`, one token: files outside the model", lambda c: c["completion"]["files outside"], "≤ 12"),
        ("functions outside the model", lambda c: c["completion"]["functions outside"], ""),
        ("files in all", lambda c: c["completion"]["files"], ""),
        ("threads", lambda c: c["completion"]["threads"], ""),
        ("switches", lambda c: c["completion"]["switches"], ""),
        ("`Engine.create`: thread segments", lambda c: c["create"]["segments"], "≤ 4"),
        ("files", lambda c: c["create"]["files"], ""),
        ("functions", lambda c: c["create"]["functions"], ""),
        ("import cycles of files", lambda c: c["cycles"], "0"),
        ("class names that stand twice", lambda c: c["doubled"], "0"),
    ]
    lines = [f"| walk | {head} | aim |", f"|---|{rule}--:|"]
    lines += [f"| {what} | " + " | ".join(str(of(c)) for c in columns) + f" | {aim} |" for what, of, aim in rows]
    units = sorted({unit for column in columns for unit in column["lines"]})
    lines += ["", f"| lines of unit | {head} |", f"|---|{rule}"]
    lines += [f"| `{unit}` | " + " | ".join(f"{c['lines'][unit]:,}" for c in columns) + " |" for unit in units]
    lines += ["| **all** | " + " | ".join(f"**{sum(c['lines'].values()):,}**" for c in columns) + " |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the page, and writes it where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--walk", choices=WALKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.walk:
        found = json.dumps(WALKS[options.walk]())
        print(found, flush=True)
        os._exit(0)  # no thread of a server keeps the process
    text = (
        f"# Walks through the code, {date.today()}\n\n`python -m benchmarks.walks`; its docstring has the definitions."
    )
    text += f" Python {sys.version.split()[0]}, medians of {REPEATS} where threads are counted.\n\n"
    text += page([measured(checkout.resolve()) for checkout in options.checkouts])
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
