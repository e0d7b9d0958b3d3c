"""Files that commands write beside what they print: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longread.config import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from longread.evaluate import Evaluation, Figures


def stdout() -> Console:
    """Where tables go: as wide as the terminal, and wide enough in a file or a pipe."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(width=160, soft_wrap=True)


def check_writable(*paths: str | None) -> None:
    """Raises `UserError` before an hour of reading if one of the files could not be written after it."""
    for path in paths:
        if path is None:
            continue
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
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"cannot write {path}: {parent} is not a directory that may be written to; choose another")


def write_text(path: str | Path, text: str) -> None:
    """Writes or replaces a text file, whole or not at all. Raises `UserError` when it cannot be written."""
    from longread.files import atomic_files

    with atomic_files(Path(path)) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def show_figures(figures: Figures, plots: str | None, report: str | None, *, title: str, lead: str) -> None:
    """Prints the tables, and writes plots and page where they are wanted."""
    from longread.evaluate import figures_page, print_figures, save_charts

    print_figures(figures, stdout())
    if plots:
        save_charts(figures.charts, Path(plots))
    if report:
        write_text(report, figures_page(figures, title=title, lead=lead))


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str,
    lead: str,
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    more: Figures | None = None,
) -> None:
    """Writes the HTML page of an evaluation."""
    from longread.evaluate import html_report, html_sections

    sections = html_sections(more) if more else ()
    write_text(path, html_report(evaluation, title=title, lead=lead, training=training, more=sections))
