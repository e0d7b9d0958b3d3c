"""Read a text of any length, learning from it, and compare with the same weights read frozen.

Example:
  longread read book.txt --model runs/toy --save book.session
  zcat log.gz | longread read - --model runs/toy --session book.session --save book.session
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import add_json, add_model

if TYPE_CHECKING:
    from longread.evaluate import Evaluation, Measurement
    from longread.loading import OpenModel
    from longread.session import Session

NAME = "read"
INTERRUPTED = 130


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text; - reads stdin")
    add_model(parser)
    parser.add_argument("--session", metavar="FILE", help="go on with this saved session")
    parser.add_argument("--save", metavar="FILE", help="keep the session here")
    parser.add_argument("--no-control", action="store_true", help="leave out the frozen reading; twice as fast")
    add_json(parser)
    parser.add_argument("--report", metavar="FILE", help="write an HTML page here")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.outputs import (
        PAGE,
        SESSION,
        Output,
        check_outputs,
        figures_of,
        tables_console,
        write_report,
        write_text,
    )
    from longread.evaluate import print_tables
    from longread.evaluate.summary import FORMAT
    from longread.loading import open_model

    outputs = [
        Output("--save", options.save, SESSION),
        Output("--json", options.json, figures_of(FORMAT)),
        Output("--report", options.report, PAGE),
    ]
    check_outputs(outputs, inputs=[options.text])
    opened = open_model(options.model, options.device)
    readers = _readers(opened, options)
    interrupted = _read(opened, readers, options)
    evaluation = _evaluation(readers, interrupted)
    session = readers[0].session
    if options.save:
        session.save(options.save)
    screen = tables_console(options)
    print_tables(evaluation, screen)
    kept = f"; kept in {options.save}" if options.save else ""
    size = f"{session.nbytes / 2**20:.1f} MiB of state, drift {session.drift():.3f}"
    screen.out(f"{session.position:,} tokens read, {size}{kept}", highlight=False)
    if options.json:
        write_text(options.json, json.dumps(evaluation.as_json(), indent=2) + "\n")
    if options.report:
        write_report(
            options.report, evaluation, title=f"Reading {Path(options.text).name}", lead=f"With {opened.name}."
        )
    return INTERRUPTED if interrupted else 0


class _Reader:
    """A session and the losses of what it reads in this command."""

    def __init__(self, opened: OpenModel, session: Session) -> None:
        from longread.evaluate import InnerSteps, Measurement, PositionLoss, bin_edges

        config = opened.model.config
        self.session = session
        self.measurement: Measurement = Measurement(
            opened.name,
            session.learn and config.num_suffix_blocks > 0,
            [PositionLoss(bin_edges())],
            InnerSteps(opened.inner.clip),
            config.num_parameters,
            config.num_fast_weights,
        )

    def read(self, ids: list[int], byte_lengths: list[int]) -> None:
        import numpy as np

        from longread.evaluate import settle

        started, position = time.perf_counter(), self.session.position
        nll = self.session.read(ids).double().cpu().numpy()
        self.measurement.seconds += time.perf_counter() - started
        self.measurement.tokens += len(ids)
        norms = self.session.inner_grad_norms.double().cpu().numpy()
        M = self.session.model.config.mini_batch_size
        nll, found = settle("the text", nll, np.ones(len(ids), dtype=bool), norms, start=position, M=M)
        if found and not self.measurement.diverged:
            self.measurement.diverged.append(found)
        self.measurement.losses[0].add(nll, np.array(byte_lengths))
        self.measurement.inner_steps.add(norms)
        if math.isfinite(drift := self.session.drift()):
            self.measurement.drift[self.session.position] = [drift]


def _readers(opened: OpenModel, options: argparse.Namespace) -> list[_Reader]:
    """The learning reader first, then the frozen control if the model has fast weights and it is wanted."""
    session = opened.restore(options.session) if options.session else opened.session()
    control = session.fork()
    control.learn = False
    readers = [_Reader(opened, session)]
    if session.learn and opened.model.config.num_suffix_blocks and not options.no_control:
        readers.append(_Reader(opened, control))
    beginning = opened.tokenizer.beginning
    if beginning and not session.position:
        for reader in readers:
            reader.read(beginning, [0])
    return readers


def _read(opened: OpenModel, readers: list[_Reader], options: argparse.Namespace) -> bool:
    """Reads to the end of the text, or to an interrupt; says which. What was read is never half-learned."""
    from longread.cli.outputs import progress_console
    from longread.cli.texts import read_tokens

    console = progress_console(options)
    with _interruptible() as interrupt, console.status("reading") as status:
        try:
            for ids, byte_lengths in read_tokens(options.text, opened.tokenizer):
                with interrupt.held():
                    for reader in readers:
                        reader.read(ids, byte_lengths)
                status.update(_progress(readers))
        except KeyboardInterrupt:
            if readers[0].session.position <= 1:
                raise
            console.print("interrupted: what follows is about the text read so far")
            return True
    return False


def _progress(readers: list[_Reader]) -> str:
    nats, _, num_bytes = readers[0].measurement.losses[0].total()
    bits = 1 / (math.log(2) * max(1, num_bytes))
    seconds = sum(reader.measurement.seconds for reader in readers)
    line = f"{readers[0].session.position:,} tokens, {readers[0].measurement.tokens / max(seconds, 1e-9):,.0f} tokens/s"
    if num_bytes:
        line += f", {nats * bits:.3f} bits per byte"
        if len(readers) > 1:
            frozen = readers[1].measurement.losses[0].total()[0]
            line += f", {(frozen - nats) * bits:+.3f} gained by learning"
    return line


class _Interrupt:
    """SIGINT that waits while a piece of text is being learned, so that all readers stay at one position."""

    def __init__(self) -> None:
        self._holding = self._requested = False

    def __call__(self, *_: object) -> None:
        if self._holding and not self._requested:
            self._requested = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._requested:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluation(readers: list[_Reader], interrupted: bool) -> Evaluation:
    from longread.evaluate import default_lengths, summarize

    session = readers[0].session
    M = session.model.config.mini_batch_size
    notes = ["The reading was interrupted: the figures are about its beginning."] if interrupted else []
    if readers[0].measurement.learn and not readers[0].measurement.inner_steps.count:
        tokens = readers[0].measurement.tokens
        notes.append(f"{tokens:,} tokens complete no mini-batch of {M}: nothing could be learned from them.")
    if session.rolled_back:
        notes.append(
            f"{session.rolled_back:,} of {session.steps:,} inner steps would have done damage and were rolled back: "
            "their mini-batches were read without learning."
        )
    longest = readers[0].measurement.losses[0].num_positions
    return summarize([reader.measurement for reader in readers], lengths=default_lengths(longest), notes=notes)
