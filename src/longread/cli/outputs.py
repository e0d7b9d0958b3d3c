"""Files that commands write beside what they print: checked before the work, written whole or not at all.

A file of the user is never replaced: not one that the command reads, and none but an earlier output of the same kind.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from longread.config import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from longread.evaluate import Figures

_OF_A_DATA_SET = re.compile(r"validation|(validation/)?(index\.json|tokenizer(_config)?\.json|tokens-\d+\.bin)")


_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class Kind(NamedTuple):
    """What an output is. Only a file that `holds` the same may be in its place, or an empty one."""

    name: str
    holds: Callable[[BinaryIO], bool]
    to_stdout: bool = False
    """Whether it may go there: it is text, and written in one piece."""


class Output(NamedTuple):
    """A file that a command will write: the option that asks for it, and what it will be."""

    option: str
    path: str | None
    kind: Kind


def is_stdout(path: str | Path | None) -> bool:
    """Whether an output of this name goes to stdout instead of a file."""
    return str(path) in _STDOUT


def tables_console(options: argparse.Namespace) -> Console:
    """Where a command prints what is for people: as wide as the terminal, and wide enough in a file or a pipe.

    That is stdout, or stderr if an output goes to stdout, or nowhere with `--quiet`.
    """
    taken = any(is_stdout(getattr(options, name, None)) for name in ("json", "report"))
    shown = {"needed": True, "soft_wrap": True, "stderr": taken, "quiet": options.quiet}
    console = _console(**shown)
    return console if console.is_terminal else _console(width=160, **shown)


def progress_console(options: argparse.Namespace) -> Console:
    """Where a command says how far it is: stderr, or nowhere with `--quiet`."""
    return _console(needed=False, stderr=True, quiet=options.quiet)


def _console(*, needed: bool, **options: Any) -> Console:
    """A console that is silent once nobody reads it: a `BrokenPipeError` if it is `needed`, else work goes on.

    Rich itself ends the program then, whatever it is in the middle of.
    """
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # nothing is left to say, not even at exit
            if needed:
                raise BrokenPipeError

    return Screen(**options)


def check_outputs(outputs: Iterable[Output], inputs: Iterable[str | None] = ()) -> None:
    """Refuses, before an hour of reading, what could not be written after it or would replace a file of the user.

    Args:
        inputs: what the command reads; a glob stands for what it matches, "-" and None for nothing.

    Raises:
        UserError: a file cannot be written, two are one, one is an input, or one exists and is of another kind.
    """
    read = {os.path.realpath(file) for given in inputs if given not in (None, "-") for file in _behind(str(given))}
    options: dict[str, str] = {}
    for option, path, kind in outputs:
        if path is None:
            continue
        if is_stdout(path):
            if not kind.to_stdout:
                raise UserError(f"{option} {path} is stdout, where no {kind.name} can go; give the name of a file")
            place = "-"
        else:
            place = _checked_place(path)
        if place in read:
            raise UserError(f"{option} would replace {path}, which is read; give another name")
        if place in options:
            raise UserError(f"{options[place]} and {option} are both {path}; give each a file of its own")
        options[place] = option
        if place != "-" and not _may_replace(path, kind):
            raise UserError(f"{option} would replace {path}, which is no {kind.name}; give another name")


def check_data_set(directory: str) -> None:
    """Raises `UserError` if a data set that will be replaced as a whole has a file of the user in its directory."""
    top = Path(directory).expanduser()
    if not (top / "index.json").is_file():
        return  # no data set, and `prepare` refuses to replace it
    for path in sorted(top.rglob("*")):
        if not _OF_A_DATA_SET.fullmatch(path.relative_to(top).as_posix()):
            raise UserError(f"--overwrite would replace {path}, which is no part of the data set; move it")


def figure_outputs(options: argparse.Namespace, figures_format: str, charts: Iterable[str]) -> list[Output]:
    """What `add_outputs` lets the user ask for; `charts` are the names of the plots that may be written."""
    from longread.evaluate import check_plots_can_be_drawn

    if options.plots:
        check_plots_can_be_drawn()
    plots = [Output("--plots", os.path.join(options.plots, f"{name}.png"), PLOT) for name in charts if options.plots]
    return [
        Output("--json", options.json, figures_of(figures_format)),
        Output("--report", options.report, PAGE),
        *plots,
    ]


def _behind(given: str) -> list[str]:
    path = os.path.expanduser(given)
    return [path] if os.path.exists(path) else glob.glob(path, recursive=True)


def _checked_place(path: str) -> str:
    """Where `path` leads to, links followed. Raises `UserError` if no file can be put there."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
    if Path(path) == Path() or stat.S_ISDIR(mode):
        raise UserError(f"cannot write {path}: it is a directory; give the name of a file in it")
    if not stat.S_ISREG(mode):  # it would be replaced: /dev/null by a file of that name
        raise UserError(f"cannot write {path}: it is no ordinary file; give the name of a new one")
    parent = next(p for p in Path(path).absolute().parents if os.path.exists(p))  # Path.exists may raise
    refused = UserError(f"cannot write {path}: {parent} is not a directory that may be written to; choose another")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise refused
    try:
        tempfile.TemporaryFile(dir=parent).close()  # permissions alone do not tell: root, /proc, a read-only disk
    except OSError:
        raise refused from None
    return os.path.realpath(path)


def _may_replace(path: str, kind: Kind) -> bool:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == 0 or kind.holds(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None


def _holds_session(file: BinaryIO) -> bool:
    from longread.files import FORMAT, MOST_HEADER_BYTES
    from longread.session import KIND

    size = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(size)) if size <= MOST_HEADER_BYTES else {}
        return bool(json.loads(header["__metadata__"][FORMAT])["kind"] == KIND)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _holds_page(file: BinaryIO) -> bool:
    begins = file.read(15).lower() == b"<!doctype html>"
    file.seek(max(0, os.fstat(file.fileno()).st_size - 100))
    return begins and b"<footer>Written by Longread.</footer>" in file.read()


def _begins(start: bytes, first: bytes, then: bytes = b"") -> bool:
    return start.startswith(first) and then in start


def figures_of(figures_format: str) -> Kind:
    """JSON of one format ("longread-needle/1"), of whatever version."""
    name = figures_format.partition("/")[0]
    begins = re.compile(rb'\s*\{\s*"format":\s*"' + re.escape(name.encode()) + rb"/")
    return Kind(f"file of figures ({name})", lambda file: begins.match(file.read(256)) is not None, to_stdout=True)


SESSION = Kind("session", _holds_session)
PAGE = Kind("page of Longread", _holds_page, to_stdout=True)
PLOT = Kind("plot of Longread", lambda file: _begins(file.read(1024), b"\x89PNG", b"Matplotlib"))
BENCH_ROWS = Kind("list of rows", lambda file: True)  # the command adds to it, and first reads what it holds
BENCH_PAGE = Kind("page of `longread bench`", lambda file: _begins(file.read(64), b"# Speed and memory, "))
BENCH_PLOT = Kind("plot of `longread bench`", lambda file: _begins(file.read(1024), b"<svg ", b'role="img">'))


def write_text(path: str | Path, text: str, *, private: bool = False) -> None:
    """Writes or replaces a text file, whole or not at all, or writes to stdout; `private`: for its owner alone.

    Raises `UserError` when it cannot be written.
    """
    from longread.files import atomic_files

    if is_stdout(path):
        _write_to_stdout(text)
        return
    with atomic_files(Path(path), private=private) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def _write_to_stdout(text: str) -> None:
    if sys.stdout is None:
        raise UserError("cannot write to stdout: it is closed; give the name of a file")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())  # UTF-8 as in a file, whatever the terminal's encoding is
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to stdout: {error.strerror}; give the name of a file") from None


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for the lead of a page: all of them, or where they are many the first, and how many more."""
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def show_figures(options: argparse.Namespace, figures: Figures, *, title: str, lead: str) -> None:
    """Prints the tables, and writes plots and page where they are wanted."""
    from longread.evaluate import figures_page, print_figures, save_charts

    print_figures(figures, tables_console(options))
    if options.plots:
        save_charts(figures.charts, Path(options.plots))
    if options.report:
        write_text(options.report, figures_page(figures, title=title, lead=lead))
