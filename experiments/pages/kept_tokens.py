"""Needles of an adapted reader that keeps tokens beyond its window, by what is kept, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.page import Data, Plot, Table
from experiments.pages import recall
from experiments.results import Results

SLUG = "kept-tokens"
HEADING = """# Does a constant memory of surprising tokens bring recall back?

What came out, at which contexts it ends, what ordinary loss and speed cost, and whether choice, addressing or read-out
fails."""
NEEDS = ("kept-256",)
BASE = recall.BASE
MODELS = {
    "first-order": BASE,
    "kept-first": "first 16 tokens kept",
    "kept-64": "64 kept",
    "kept-256": "256 kept",
    "kept-256-run-48": "256 kept, runs of 48",
    "kept-1024": "1024 kept",
    "kept-1024-run-48": "1024 kept, runs of 48",
    "kept-256-chance": "256 kept by chance",
    "kept-256-needle": "256 kept, the needle always",
}
"""By job. Runs are of 16 tokens where nothing is said."""


def gather(found: Results) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for job, name in MODELS.items():
        searches = (found.evaluations.get(f"needle-{job}") or found.evaluations.get(job, {})).get("question", {})
        answers = {
            each["reading"]: {"question": recall._trials(each["trials"])} for each in searches.get("results", [])
        }
        asked |= {name: answers} if answers else {}
    books = {name: recall._books(found, job) for job, name in MODELS.items()}
    return {"asked": asked, "books": {name: row for name, row in books.items() if row}}


def tables(results: Data) -> Iterator[Table]:
    yield from (table for table in _tables(results) if table.rows)


def _tables(results: Data) -> Iterator[Table]:
    asked = results["asked"]
    for reading in ("learning", "frozen"):
        for variant in recall.VARIANTS:
            found = {name: recall._Answers(answers.get(reading, {}), variant) for name, answers in asked.items()}
            contexts = sorted({context for said in found.values() for context in said.by_context}, key=int)
            far = [c for c in contexts if any(said.part(False, [c])[0] for said in found.values())]
            head = ["", *(f"beyond, {int(context):,}" for context in far)]
            for what, cell in (("needles found", recall._share), ("nats of the value", recall._mean)):
                rows = [[name, *(cell(*said.part(False, [c])) for c in far)] for name, said in found.items()]
                yield Table(f"{variant}, {reading}, {what}:", head, [row for row in rows if any(row[1:])])
    yield Table(_PAIRS, _PAIR_HEAD, list(_pairs(asked)))
    yield Table(recall._BOOKS, recall._BOOK_HEAD, list(recall._book_rows(results["books"])))


_PAIRS = "Needles beyond the window, two readers of the same prompts, in contexts that both have read:"
_PAIR_HEAD = ["", "needles", "prompts", "found by the first alone", "by the second alone", "p, McNemar", "nats less"]
_COMPARED = (
    ("256 kept", BASE),
    ("256 kept", "first 16 tokens kept"),
    ("256 kept", "256 kept by chance"),
    ("256 kept, the needle always", "256 kept"),
    ("1024 kept, runs of 48", "256 kept"),
)


def _pairs(asked: Data) -> Iterator[list[str]]:
    for one, other in _COMPARED:
        for reading in ("learning", "frozen"):
            for variant in recall.VARIANTS:
                pair = [recall._Answers(asked.get(name, {}).get(reading, {}), variant) for name in (one, other)]
                row = recall._paired(*pair, False)
                if row:
                    yield [f"{one}, {other}: both {reading}", variant, *row]


def plots(_: Results) -> Iterator[Plot]:
    """None: the tables say it."""
    return iter(())
