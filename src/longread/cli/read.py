"""Read texts of any length, learning from them, and compare with the same weights read frozen.

Example:
  longread read book.txt --model runs/toy --save book.session
  longread read book.txt --model runs/toy --save book.session --resume
  zcat log.gz | longread read - --model runs/toy --session book.session --save book.session

With --save the session is kept every half minute and whenever the reading ends: by Ctrl-C, SIGTERM, a bad byte, too
little memory. The same command with --resume goes on at the byte where it stopped and ends with the session, on a CPU
bit for bit, that it would have without the stop. Texts that do not begin with what was read are refused; a pipe has to
begin again.

--session reads the texts after all that the session has read. Only if it was stopped in the middle of just these files
does it go on there instead.

The frozen control reads the same with weights that learn nothing, which takes up to as long again. So it reads files of
up to 256 KiB in all; --control lets it read longer ones, and pipes. It has no part in a reading that goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from longread.cli.arguments import (
    add_json,
    add_kept_tokens,
    add_learn,
    add_model,
    add_text_format,
    format_of,
    say_if_frozen,
    settle_reading,
)

if TYPE_CHECKING:
    from longread.cli.reading.pieces import Inputs
    from longread.cli.reading.session_file import Autosave
    from longread.session import TextPrefix

MOST_CONTROL_BYTES = 2**18


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "texts", nargs="+", metavar="FILE", help="a text, or several, or directories of texts, in order; - reads stdin"
    )
    add_model(parser)
    add_text_format(parser)
    parser.add_argument("--session", metavar="FILE", help="go on with this saved session")
    parser.add_argument("--save", metavar="FILE", help="keep the session here, now and then and at the end")
    parser.add_argument("--resume", action="store_true", help="go on where the reading stopped that --save keeps")
    parser.add_argument(
        "--save-every", type=float, metavar="SECONDS", help="how often to save (default 30; rarer if saving takes long)"
    )
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        help="read the frozen control too (default: of files of up to 256 KiB)",
    )
    add_learn(parser)
    add_kept_tokens(parser)
    add_json(parser)
    parser.add_argument("--report", metavar="FILE", help="write an HTML page here")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.outputs import check_outputs
    from longread.cli.reading.course import Course
    from longread.cli.reading.pieces import Inputs, OtherText
    from longread.cli.reading.progress import ReadingProgress
    from longread.cli.reading.readers import Readers
    from longread.cli.reading.results import write_results
    from longread.cli.reading.session_file import Autosave, begin, check_room, session_file
    from longread.cli.reading.stops import StopSignals
    from longread.config import UserError
    from longread.loading import open_model

    goes_on_with = [("--save", options.session), ("--save", options.save if options.resume else None)]
    check_outputs(options, inputs=options.texts, goes_on_with=goes_on_with)
    if options.resume and not (options.save or options.session):
        raise UserError("--resume does not say which reading to go on with; give --save or --session")
    inputs = Inputs(options.texts, format_of(options))
    goes_on = session_file(options.session, options.save, resume=options.resume)
    opened = settle_reading(options, open_model(options.model, options.device), goes_on)
    if options.save:
        check_room(options.save, opened.model)
    session, begun, file = begin(opened, inputs, session=options.session, save=options.save, resume=options.resume)
    session.learn = session.learn or options.learn
    if goes_on is not None:
        say_if_frozen(options, opened, learns=session.learn)
    readers = Readers(opened, session, control=_wants_control(options, inputs, begun))
    notes = readers.go_on(begun) if begun else []
    saving = Autosave(options.save, every=options.save_every, saved=begun if file == options.save else None)
    progress = ReadingProgress(inputs, quiet=options.quiet)
    with StopSignals(lambda first: _answer(saving, first)) as stops:
        course = Course(opened, readers, saving, stops, progress)
        ended = course.read_texts(inputs, begun, live=inputs.piped)
        if isinstance(ended, OtherText):
            raise UserError(f"{file} has read another text: {ended}; give the text that it was reading")
        if (ended is not None and (course.pieces_read or begun)) or saving.refused:
            print(_how_to_go_on(options, saving), file=sys.stderr)
        if ended is not None and not course.pieces_read:
            raise ended
        with stops.open():  # a second signal leaves the figures out
            write_results(options, opened, readers, notes, stops.name or str(ended) if ended else None)
    if isinstance(ended, Exception):
        raise ended
    if saving.refused:
        raise saving.refused
    return 128 + stops.number if stops.number else 0


def _wants_control(options: argparse.Namespace, inputs: Inputs, begun: TextPrefix | None) -> bool:
    """Whether the frozen control reads too. It cannot have read the beginning that an earlier command has read."""
    if options.control is not None or begun is not None:
        return bool(options.control and begun is None)
    return inputs.size is not None and inputs.size <= MOST_CONTROL_BYTES


def _answer(saving: Autosave, first: bool) -> str:
    """To a signal, while it takes effect."""
    if not first:
        return "ending at once, without the figures; what is saved stays saved"
    if saving.path is None:
        return "stopping; without --save only the figures are left of what was read"
    return f"stopping, and keeping what was read in {saving.path}"


def _how_to_go_on(options: argparse.Namespace, saving: Autosave) -> str:
    """After a stop: the command that continues, if anything can be continued."""
    if saving.saved is None:
        return f"longread: {saving}" + ("" if saving.path else "; with --save FILE a reading can be gone on with")
    written = ["--force"] if options.json or options.report else []  # figures of this part; of the whole they will be
    arguments = [*options.arguments, *(new for new in ["--resume", *written] if new not in options.arguments)]
    return f"longread: {saving}; this goes on there:\n  {shlex.join(['longread', *arguments])}"
