"""What a text tells, with a question that asks for it."""

from __future__ import annotations

from typing import NamedTuple


class TextFact(NamedTuple):
    """A question that a text answers."""

    kind: str
    evidence_end: int
    """UTF-8 bytes of the text up to the end of what tells the answer."""
    question: str
    """Read after the text."""
    answer: str
    """Follows the question, and begins with the white space between them."""
    form: str
    """Answers of one form may be offered together."""
