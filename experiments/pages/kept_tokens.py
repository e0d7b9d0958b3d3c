"""Needles of an adapted reader that keeps tokens beyond its window, by what is kept, and what that costs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.adapted.kept import QUESTIONS
from experiments.figures import panel
from experiments.merging import merged, runs_table
from experiments.page import Data, Plot, Table
from experiments.pages import recall
from experiments.pages.answers import NOTHING, Asked, asked_of, pairs_table
from experiments.results import Results

from longread.evaluate import Line
from longread.evaluate.needle import GUESS

SLUG = "kept-tokens"
HEADING = """# Does a constant memory of surprising tokens bring recall back?

What came out, at which contexts it ends, what ordinary loss and speed cost, and whether choice, addressing or read-out
fails."""
NEEDS = ("kept-256",)
BASE = recall.BASE
NONE_FAR = f"{BASE}, 128K"
MODELS = {
    "first-order": BASE,
    "kept-none-far": NONE_FAR,
    "kept-first": "first 48 tokens kept",
    "kept-128": "128 kept",
    "kept-256": "256 kept",
    "kept-1024": "1024 kept",
    "kept-1024-far": "1024 kept, 128K",
    "kept-4096": "4096 kept",
    "kept-4096-far": "4096 kept, 128K",
    "kept-256-chance": "256 kept by chance",
    "kept-256-needle": "256 kept, the needle always",
}
"""By job."""
BY_MEAN = ("256 kept, by the plain mean", "256 kept, by the plain mean of 24", "1024 kept, by the plain mean")
"""Rows of an earlier rule of choice, which no job makes any more."""


def gather(found: Results) -> dict[str, Any]:
    """What is asked about the beginning of a text is apart: the first run stays for good, whatever it says."""
    parts: dict[str, dict[str, Any]] = {"asked": {}, "asked about the beginning": {}}
    for job, name in MODELS.items():
        for part, asked in parts.items():
            answers = {}
            for search in _searches(found, job):
                trials = [trial for trial in search["trials"] if (trial["depth"] > 0) == (part == "asked")]
                answers[search["reading"]] = {"question": recall._trials(trials)}
            asked |= {name: answers} if answers else {}
    books = {name: recall._books(found, job) for job, name in MODELS.items()}
    speeds = {name: _speeds(found, job) for job, name in MODELS.items()}
    asked = asked_of(found.evaluations.get(QUESTIONS, {}), "books", MODELS)
    return parts | {
        "questions": {"books": asked} if asked else {},
        "books": {name: row for name, row in books.items() if row},
        "tokens/s": {name: speed for name, speed in speeds.items() if speed},
    }


ROWS = dict.fromkeys(("asked", "asked about the beginning", "books", "tokens/s"), (*MODELS.values(), *BY_MEAN))
ROWS["questions"] = ("books",)


def merge(before: Data, new: Data, run: Data) -> dict[str, Any]:
    return merged(before, new, run, ROWS)


def _searches(found: Results, job: str) -> Sequence[dict[str, Any]]:
    results = found.evaluations.get(f"needle-{job}") or found.evaluations.get(job, {})
    return results.get("question", {}).get("results", ())


def _speeds(found: Results, job: str) -> dict[str, float]:
    """Tokens of the prompts by the seconds of reading and answering them, by reading."""
    return {
        search["reading"]: sum(trial["context_length"] for trial in search["trials"]) / search["seconds"]
        for search in _searches(found, job)
        if search.get("seconds")
    }


def tables(results: Data) -> Iterator[Table]:
    yield from (table for table in _tables(results) if table.rows)


def _tables(results: Data) -> Iterator[Table]:
    readers = _readers(results["asked"])
    for variant in recall.VARIANTS:
        for what, cell in (("needles found", recall._share), ("nats of the value", recall._mean)):
            yield _by_context(readers, variant, f"{variant}, {what}:", cell)
    for variant in recall.VARIANTS[1:]:
        yield _by_context(readers, variant, f"{variant}, values that cost less than half of a guess:", _stored(variant))
    beginning = _readers(results["asked about the beginning"])
    for variant in recall.VARIANTS[1:]:
        yield _by_context(beginning, variant, f"{variant}, needles found at the beginning of the text:", recall._share)
    yield Table(_PAIRS, _PAIR_HEAD, list(_pairs(results["asked"])))
    for content in results.get("questions", {}).values():
        yield from _about(Asked(content))
    yield Table(recall._BOOKS, recall._BOOK_HEAD, list(recall._book_rows(results["books"])))
    speeds = ([name, *(f"{s[r]:,.0f}" if r in s else "" for r in _READINGS)] for name, s in results["tokens/s"].items())
    yield Table(_SPEED, ["", *_READINGS], list(speeds))
    yield from runs_table(results)


_READINGS = ("learning", "frozen")
_SPEED = "Prompts read and answered, tokens a second, 60 side by side, beside other jobs on the GPU:"


def _readers(asked: Data) -> dict[str, Data]:
    return {f"{name}, {reading}": told for name, answers in asked.items() for reading, told in answers.items()}


def _by_context(readers: Mapping[str, Data], variant: str, caption: str, cell: Callable[..., str]) -> Table:
    """Of needles beyond the window."""
    found = {name: recall._Answers(told, variant) for name, told in readers.items()}
    contexts = sorted({context for said in found.values() for context in said.by_context}, key=int)
    far = [c for c in contexts if any(said.part(False, [c])[0] for said in found.values())]
    rows = [[name, *(cell(*said.part(False, [c])) for c in far)] for name, said in found.items()]
    return Table(caption, ["", *(f"{int(context):,}" for context in far)], [row for row in rows if any(row[1:])])


def _stored(variant: str) -> Callable[..., str]:
    """How many values are known, whether or not the answer begins with them."""
    most = GUESS["uuid" if variant == recall.VARIANTS[2] else "number"] / 2
    return lambda _, nats: f"{sum(cost < most for cost in nats)} of {len(nats)}" if nats else ""


_PAIRS = "Two readers of the same prompts, both learning, needles beyond the window and not at the beginning:"
_PAIR_HEAD = ["", "needles", "prompts", "found by the first alone", "by the second alone", "p, McNemar", "nats less"]
_COMPARED = (
    ("256 kept", BASE),
    ("1024 kept", BASE),
    ("1024 kept, 128K", NONE_FAR),
    ("4096 kept, 128K", NONE_FAR),
    ("4096 kept, 128K", "1024 kept, 128K"),
    ("4096 kept", "1024 kept"),
    ("1024 kept", "1024 kept, by the plain mean"),
    ("256 kept", "256 kept, by the plain mean"),
    ("256 kept", "256 kept by chance"),
    ("1024 kept", "256 kept"),
    ("256 kept, the needle always", "256 kept"),
)


def _pairs(asked: Data) -> Iterator[list[str]]:
    for (one, other), variant in itertools.product(_COMPARED, recall.VARIANTS):
        pair = [recall._Answers(asked.get(name, {}).get("learning", {}), variant) for name in (one, other)]
        row = recall._paired(*pair, False)
        if row:
            yield [f"{one}, {other}", variant, *row]


def _about(asked: Asked) -> Iterator[Table]:
    """Questions with the evidence beyond the window."""
    rows = []
    for label in asked.readers:
        shares = [asked.share(label, measure, asked.far) for measure in ("right", "written")]
        rows.append([label, str(len(asked.chosen(label, asked.far))), *shares, asked.nats(label, asked.far)])
    yield Table(_QUESTIONS, ["", "questions", "right", "written", "nats of the right answer"], rows)
    yield pairs_table("books", asked, _ASKED_PAIRS, asked.far)


_QUESTIONS = "Questions about books, evidence beyond the window; chance 0.17:"
_ASKED_PAIRS = tuple(
    ("1024 kept, learning", other) for other in (f"{BASE}, learning", f"1024 kept, {NOTHING}", "1024 kept, frozen")
)


def plots(results: Data) -> Iterator[Plot]:
    charts = []
    for variant in recall.VARIANTS[1:]:
        lines = []
        for name in PLOTTED:
            said = recall._Answers(results["asked"].get(name, {}).get("learning", {}), variant)
            found = {int(context): said.part(False, [context])[0] for context in said.by_context}
            points = [(float(context), statistics.mean(map(float, at))) for context, at in sorted(found.items()) if at]
            lines += [Line(name, points)] if points else []
        charts += [panel(variant, lines, "share found", ticks=recall.TICKS)] if lines else []
    if charts:
        yield Plot("found", "Share of needles found beyond the window, by context, learning", charts)


PLOTTED = (BASE, "256 kept", "1024 kept", "1024 kept, by the plain mean", "256 kept, the needle always")
