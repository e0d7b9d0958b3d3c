"""Files that commands write beside what they print: checked before the work, written whole or not at all.

What is there is replaced only with --force, and what the command reads never.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longread.config import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from longread.evaluate import Figures

_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_OF_A_DATA_SET = re.compile(r"validation|(validation/)?(index\.json|tokenizer(_config)?\.json|tokens-\d+\.bin)")
_OF_A_MODEL = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("model.safetensors", "weights.safetensors", "optimizer.safetensors", "agent.safetensors"),
    *("checkpoint.safetensors", "manifest.json", "state.json", "run.json", "metrics.jsonl", "index.json"),
}
"""Names of files that hold a model, a tokenizer, a run or a data set."""


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


@contextlib.contextmanager
def counted(console: Console, name: str, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Says there how far `name` is with `total` of `what`; gives what is to be told how many more are done."""
    done = 0
    with console.status(f"{name}: {total:,} {what}") as status:

        def show(count: int) -> None:
            nonlocal done
            done += count
            status.update(f"{name}: {done:,} of {total:,} {what}")

        yield show


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


def check_outputs(
    options: argparse.Namespace,
    *,
    inputs: Iterable[str | None] = (),
    plots: Iterable[str] = (),
    goes_on_with: Collection[tuple[str, str | None]] = (),
) -> None:
    """Refuses, before an hour of reading, what could not be written after it, and what would replace a file.

    The outputs are those of --save, --json, --report and --plots, as far as the command has them and they are asked
    for. With --force they may replace files, but none that is read, and none of a model, a run or a data set.

    Args:
        inputs: what the command reads; a directory stands for all that is in it, a glob for what it matches, "-" and
            None for nothing.
        plots: names of the files that may be written into --plots.
        goes_on_with: outputs that the command reads first, without losing what is in them: their options and paths.

    Raises:
        UserError: a file cannot be written, two are one, one is an input, or one exists that may not be replaced.
    """
    read = {os.path.realpath(file) for given in inputs if given not in (None, "-") for file in _behind(str(given))}
    going_on = {(option, os.path.realpath(path)) for option, path in goes_on_with if path is not None}
    files_alone = {option for option, _ in goes_on_with}
    places: dict[str, str] = {}
    for option, path in _asked_for(options, plots):
        if is_stdout(path) and option in files_alone:
            raise UserError(f"{option} {path} is stdout, which cannot be gone on with; give the name of a file")
        place = "-" if is_stdout(path) else _checked_place(path)
        if place in places:
            raise UserError(f"{places[place]} and {option} are both {path}; give each a file of its own")
        places[place] = option
        exists = place != "-" and _holds_something(place)
        elsewhere = {file for other, file in going_on if other != option}
        if place in read | elsewhere or (exists and read.intersection(map(str, Path(place).parents))):
            raise UserError(f"{option} would replace {path}, which is read; give another name")
        if not exists or (option, place) in going_on:
            continue
        if Path(place).name in _OF_A_MODEL:
            raise UserError(f"{option} would replace {path}, a file of a model, run or data set; give another name")
        if not options.force:
            resumes = "--resume goes on with it, " if option == "--save" and hasattr(options, "resume") else ""
            raise UserError(f"{option} would replace {path}; {resumes}--force replaces it, another name leaves it be")


def check_figures(options: argparse.Namespace, charts: Iterable[str], *, inputs: Iterable[str | None] = ()) -> None:
    """`check_outputs` for a command that measures; `charts` are the names of the plots that may be written."""
    from longread.evaluate import check_plots_can_be_drawn

    if options.plots:
        check_plots_can_be_drawn()
    check_outputs(options, inputs=inputs, plots=[f"{name}.png" for name in charts])


def _asked_for(options: argparse.Namespace, plots: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every file that will be written: the option that asks for it, and its path."""
    for name in ("save", "json", "report"):
        if (path := getattr(options, name, None)) is not None:
            yield f"--{name}", path
    for name in plots if getattr(options, "plots", None) else ():
        yield "--plots", os.path.join(options.plots, name)


def _holds_something(place: str) -> bool:
    try:
        return os.stat(place).st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_data_set(directory: str) -> None:
    """Raises `UserError` if a data set that will be replaced as a whole has a file of the user in its directory."""
    top = Path(directory).expanduser()
    if not (top / "index.json").is_file():
        return  # no data set, and `prepare` refuses to replace it
    for path in sorted(top.rglob("*")):
        if not _OF_A_DATA_SET.fullmatch(path.relative_to(top).as_posix()):
            raise UserError(f"--overwrite would replace {path}, which is no part of the data set; move it")


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
