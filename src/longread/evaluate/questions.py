"""Questions about a text that has been read, made from the text itself by rules; no model is asked.

A question has one right answer, of a few words, and wrong ones of the same form from the same text, about as frequent
there. So who knows the words of a text and nothing else is right by chance, but for what the wording of a question
gives away: the same questions with nothing read say how much that is. Where the evidence lies is known.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longread.evaluate.facts import TextFact
from longread.evaluate.prose_facts import prose_facts
from longread.evaluate.source_facts import source_facts
from longread.tokenizer import Tokenizer


class Candidate(NamedTuple):
    """A possible answer, which follows the question without anything between."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """One question, asked after the first `context_length` tokens of a text."""

    kind: str
    context_length: int
    evidence_end: int
    """Tokens of the text up to the end of what tells the answer."""
    text: str
    ids: tuple[int, ...]
    choices: tuple[Candidate, ...]
    """The right one first."""

    @property
    def distance(self) -> int:
        """Tokens of the text after the evidence."""
        return self.context_length - self.evidence_end


def make_questions(
    text: str,
    byte_lengths: np.ndarray,
    tokenizer: Tokenizer,
    context_length: int,
    *,
    per_kind: int,
    num_choices: int = 6,
    seed: int = 0,
) -> list[Question]:
    """Questions about the first `context_length` tokens of a text, in the order of their evidence.

    A text that Python can parse is asked about as source, any other as prose. What is asked of a text depends on
    nothing but these arguments.

    Args:
        text: all of it, of which only the beginning has been read: source is parsed whole.
        byte_lengths: UTF-8 bytes that each of its tokens covers, int64 [n], n >= context_length; 0 for a BOS.
        per_kind: at most so many of each kind.
        num_choices: answers to choose from.
    """
    ends = np.cumsum(byte_lengths[:context_length])
    num_bytes = int(ends[-1])
    facts = source_facts(text, num_bytes)
    if facts is None:
        facts = prose_facts(text, num_bytes)
    read = text.encode()[:num_bytes].decode(errors="ignore")
    answers: dict[str, dict[str, float]] = {}
    for form, answer in sorted({(fact.form, fact.answer) for fact in facts}):
        answers.setdefault(form, {})[answer] = math.log(read.count(answer.strip()) + 1)
    found = []
    for kind, same in itertools.groupby(sorted(facts), key=lambda fact: fact.kind):
        members = list(same)
        draw = random.Random(f"{seed} {kind} {context_length} {num_choices}")  # noqa: S311 (no secret)
        draw.shuffle(members)
        chosen = ((fact, _choices(fact, answers[fact.form], num_choices, draw)) for fact in members)
        enough = ((fact, choices) for fact, choices in chosen if len(choices) == num_choices)
        for fact, choices in itertools.islice(enough, per_kind):
            found.append(_question(fact, choices, tokenizer, context_length, ends))
    return sorted(found, key=lambda question: question.evidence_end)


def _choices(fact: TextFact, answers: dict[str, float], wanted: int, draw: random.Random) -> list[str]:
    """The right answer, and others of its form: those first that begin with the same word, then those that are about
    as frequent in the text.

    None of the others stands in the question, and none begins with another: that one would always be as likely.
    """
    first, usual = fact.answer.split()[0], answers[fact.answer]

    def rank(answer: str) -> tuple[bool, float, float]:
        return answer.split()[0] != first, abs(answers[answer] - usual), draw.random()

    kept = [fact.answer]
    for answer in sorted(answers, key=rank):
        begins = any(answer.startswith(other) or other.startswith(answer) for other in kept)
        if len(kept) < wanted and not begins and answer.strip() not in fact.question:
            kept.append(answer)
    return kept


def _question(
    fact: TextFact, choices: list[str], tokenizer: Tokenizer, context_length: int, ends: np.ndarray
) -> Question:
    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode_inside(text)[0])

    return Question(
        fact.kind,
        context_length,
        1 + int(np.searchsorted(ends, fact.evidence_end)),
        fact.question,
        encoded(fact.question),
        tuple(Candidate(answer, encoded(answer)) for answer in choices),
    )
