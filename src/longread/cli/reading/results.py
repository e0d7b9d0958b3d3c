"""The results of a reading, for people and for programs, and how it ended."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from longread.cli.outputs import tables_console, write_text
from longread.cli.reading.readers import Readers
from longread.evaluate import Evaluation, default_lengths, html_report, print_tables, summarize
from longread.loading import OpenModel


def write_results(
    options: argparse.Namespace, opened: OpenModel, readers: Readers, notes: list[str], stopped: str | None
) -> None:
    """Prints the tables, and writes figures and page where they are wanted.

    Args:
        stopped: what came before the end of the texts, in a few words.
    """
    session, text = readers.session, readers.session.text
    notes = [*notes, *_notes(readers, stopped)]
    evaluation = _evaluation(readers, notes)
    screen = tables_console(options)
    print_tables(evaluation, screen)
    kept = f"; kept in {options.save}" if options.save else ""
    size = f"{session.nbytes / 2**20:.1f} MiB of state, drift {session.drift():.3f}"
    screen.out(f"{session.position:,} tokens read, {size}{kept}", highlight=False)
    if options.json:
        about: dict[str, Any] = {
            "position": session.position,
            "bytes": text.num_bytes if text else 0,
            "sha256": text.sha256 if text else None,
            "complete": stopped is None,
            "stopped": stopped,
            "save": options.save,
        }
        write_text(options.json, json.dumps(evaluation.as_json() | {"text": about}, indent=2) + "\n")
    if options.report:
        title = "Reading " + ", ".join(Path(name).name for name in options.texts)
        write_text(options.report, html_report(evaluation, title=title, lead=f"With {opened.name}."))


def _evaluation(readers: Readers, notes: list[str]) -> Evaluation:
    longest = readers.measurements[0].losses[0].num_positions
    return summarize(readers.measurements, lengths=default_lengths(longest), notes=notes)


def _notes(readers: Readers, stopped: str | None) -> list[str]:
    session, learning = readers.session, readers.measurements[0]
    notes = []
    if stopped:
        read = session.text.num_bytes if session.text else 0
        notes.append(f"The reading was interrupted ({stopped}): the figures are about its first {read:,} bytes.")
    if learning.learn and not learning.inner_steps.count:
        M = session.model.config.mini_batch_size
        notes.append(f"{learning.tokens:,} tokens complete no mini-batch of {M}: nothing could be learned from them.")
    if session.rolled_back:
        notes.append(
            f"{session.rolled_back:,} of {session.steps:,} inner steps would have done damage and were rolled back: "
            "their mini-batches were read without learning."
        )
    return notes
