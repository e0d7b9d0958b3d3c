"""Continuations for people and as JSON, one of them or turn by turn; the session has read what was shown."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Generator

from longread.cli.outputs import is_stdout, write_text
from longread.cli.reading.stops import Stop, StopSignals
from longread.config import UserError
from longread.session import Session, text_of
from longread.speculative import Speculation
from longread.tokenizer import Tokenizer

FORMAT = "longread-generation/1"


class Answers:
    """The answers of a session to each prompt, as the options of the command say.

    Args:
        pair: the session and one that guesses, where there is one.
    """

    def __init__(
        self, options: argparse.Namespace, tokenizer: Tokenizer, session: Session, pair: Speculation | None
    ) -> None:
        self._options, self._tokenizer, self._pair = options, tokenizer, pair
        self.session = session
        self.prompt_tokens = 0
        """Of the newest prompt."""
        self.begin = session.position
        """Where the newest answer begins."""

    def decode(self, ids: list[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(ids)

    def show(self, prompt: str) -> str:
        """Reads a prompt and writes what follows it, and a line end, to stdout, or to stderr if JSON goes to stdout.

        What could not be shown, because of a signal or a closed pipe, has not been read.
        """
        shown = ""
        with contextlib.closing(self._pieces(prompt)) as pieces:
            for piece in pieces:
                try:
                    self._write(piece)
                except BaseException as error:
                    pieces.throw(error)
                shown += piece
        self._write("\n")
        return shown

    def _pieces(self, prompt: str) -> Generator[str, None, None]:
        options, writer = self._options, self._pair or self.session
        sessions = [self._pair.verifier, self._pair.drafter] if self._pair else [self.session]
        self.prompt_tokens = len(writer.read(prompt))
        self.begin = self.session.position
        ids = writer.generate(
            options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            stop_ids=self._tokenizer.beginning,
        )
        return text_of(ids, self._tokenizer, sessions, stops=options.stop)

    def _write(self, text: str) -> None:
        beside = is_stdout(self._options.json)
        if not (beside and self._options.quiet):
            stream = sys.stderr if beside else sys.stdout
            stream.write(text)
            stream.flush()


def write_answer(options: argparse.Namespace, answers: Answers, prompt: str) -> None:
    """One continuation, and its JSON where it is wanted."""
    session, started = answers.session, time.perf_counter()
    text = answers.show(prompt)
    if options.json:
        written = session.position - answers.begin
        found = {
            "format": FORMAT,
            "text": text,
            "prompt_tokens": answers.prompt_tokens,
            "tokens": written,
            "finish_reason": "length" if written == options.max_tokens else "stop",
            "position": session.position,
            "seconds": time.perf_counter() - started,
        }
        write_text(options.json, json.dumps(found, indent=2) + "\n")


def converse(answers: Answers, stops: StopSignals, save: Callable[[], None]) -> int:
    """Reads lines and answers each, until there are no more; the session is kept after every answer.

    Ctrl-C ends an answer, and nothing else where there is none; other signals end it all. Returns the exit status.
    """
    text = answers.decode(answers.session.recent)
    ends_line = not text or text.endswith("\n")  # whether what the session has read last is the end of a line
    while True:
        try:
            with stops.open():
                line = _line()
            if line is None:
                return 0
            with stops.open():
                between = "" if ends_line or not line else "\n"
                ends_line = answers.show(f"{between}{line}\n" if line else "").endswith("\n")
        except Stop as stop:
            if stop.number != signal.SIGINT:
                return stop.exit_status
            print(file=sys.stderr)
            ends_line = False
        finally:
            save()


def _line() -> str | None:
    """The next line that is typed, or comes through a pipe; None after the last."""
    if sys.stdin is None:
        raise UserError("stdin is closed; give a prompt")
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - lines can be edited, and the last ones come back

        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
