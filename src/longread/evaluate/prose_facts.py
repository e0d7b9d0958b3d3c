"""What prose tells: the name that completes a sentence, how a sentence goes on, who bears a title.

| kind | the question quotes | the answer |
|---|---|---|
| name | twelve words | the proper name after them |
| sentence | the first eight words of a sentence | the four words after them |
| title | a title that the text gives to one name alone | that name |

A proper name is a capitalised word inside a sentence that the text never writes in lower case. What is quoted stands in
the text once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from longread.evaluate.facts import TextFact

QUOTED, OPENING, FOLLOWING = 12, 8, 4
"""Words quoted before a name, words quoted of a sentence, and words asked for after these."""
TITLES = frozenset(
    (
        *("Mr", "Mrs", "Miss", "Dr", "Doctor", "Professor", "Judge", "Inspector", "Parson", "Reverend", "Squire"),
        *("Captain", "Colonel", "Major", "General", "Lieutenant", "Sergeant", "Corporal", "Private", "Admiral"),
        *("Sir", "Lady", "Lord", "Duke", "Duchess", "Count", "Countess", "Baron", "Baroness"),
        *("Prince", "Princess", "King", "Queen", "Madame", "Monsieur", "Mademoiselle"),
        *("Uncle", "Aunt", "Cousin", "Father", "Mother", "Brother", "Sister"),
    )
)
_ABBREVIATIONS = frozenset(("mr", "mrs", "ms", "dr", "st", "prof", "rev", "capt", "col", "gen", "lieut", "sergt"))
_OPENING_MARKS = "\"'(\u201c\u2018"
_NAME = re.compile(r"([A-Z][a-z\u00df-\u00ff]{2,})(?:['\u2019]s)?[^\w\s]*")
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*$")


class _Word(NamedTuple):
    text: str
    end: int
    """Characters of the text up to its end."""
    paragraph: int


def prose_facts(text: str, num_bytes: int) -> list[TextFact]:
    """All facts of these kinds in the first `num_bytes` bytes of a text; at most one of each name."""
    text = text.encode()[:num_bytes].decode(errors="ignore")
    words = list(_words(text))
    in_lower_case = set(re.findall(r"\b[a-z\u00df-\u00ff]+\b", text))
    names = {i: name for i in range(1, len(words)) if (name := _name(words[i - 1], words[i], in_lower_case))}
    plain = " ".join(word.text for word in words)
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    facts = [*_named(words, names, plain), *_sentences(words, plain), *_titled(words, names)]
    return [fact._replace(evidence_end=int(bytes_before[fact.evidence_end])) for fact in facts]


def _words(text: str) -> Iterator[_Word]:
    paragraph, end = 0, 0
    for match in re.finditer(r"\S+", text):
        paragraph += text.count("\n", end, match.start()) > 1
        end = match.end()
        yield _Word(match.group(), end, paragraph)


def _ends_sentence(word: _Word) -> bool:
    bare = word.text.lstrip(_OPENING_MARKS).rstrip(".").lower()
    return bool(_SENTENCE_END.search(word.text)) and bare not in _ABBREVIATIONS and len(bare) > 1


def _name(before: _Word, word: _Word, in_lower_case: set[str]) -> str | None:
    """The proper name that a word inside a sentence is, without what is written after it."""
    match = _NAME.fullmatch(word.text)
    if not match or before.paragraph != word.paragraph or _ends_sentence(before):
        return None
    name = match.group(1)
    return None if name.lower() in in_lower_case or name in TITLES else name


def _quote(words: Sequence[_Word], first: int, last: int) -> str | None:
    """Words first … last - 1, if there are so many in one paragraph."""
    if first < 0 or last > len(words) or words[first].paragraph != words[last - 1].paragraph:
        return None
    return " ".join(word.text for word in words[first:last])


def _named(words: Sequence[_Word], names: Mapping[int, str], plain: str) -> Iterator[TextFact]:
    places: dict[str, list[int]] = {}
    for i, name in names.items():
        places.setdefault(name, []).append(i)
    for name, members in places.items():
        random.Random(name).shuffle(members)  # noqa: S311 (no secret); the first places of names are introductions
        for i in members:
            quote = _quote(words, i - QUOTED, i) if _quote(words, i - QUOTED, i + 1) else None
            if quote and name not in quote and plain.count(quote) == 1:
                yield TextFact("name", words[i].end, f'\n\nThe text says: "{quote}', f" {name}", "name")
                break


def _sentences(words: Sequence[_Word], plain: str) -> Iterator[TextFact]:
    for i in range(1, len(words)):
        last = i + OPENING + FOLLOWING
        begins = words[i].paragraph != words[i - 1].paragraph or _ends_sentence(words[i - 1])
        if not begins or not _quote(words, i, last) or any(map(_ends_sentence, words[i : last - 1])):
            continue
        quote, answer = _quote(words, i, i + OPENING), _quote(words, i + OPENING, last)
        if quote and answer and plain.count(quote) == 1:
            answer = answer.rstrip(".,;:!?\"'\u201d\u2019")
            yield TextFact("sentence", words[last - 1].end, f'\n\nThe text says: "{quote}', f" {answer}", "words")


def _titled(words: Sequence[_Word], names: Mapping[int, str]) -> Iterator[TextFact]:
    bearers: dict[str, dict[str, int]] = {}
    for i, name in names.items():
        title = words[i - 1].text.lstrip(_OPENING_MARKS)
        if title.rstrip(".") in TITLES:
            bearers.setdefault(title, {})[name] = words[i].end  # where it stands last
    for title, known in bearers.items():
        if len(known) == 1:
            ((name, end),) = known.items()
            yield TextFact("title", end, f"\n\nOne of the people in the text is called {title}", f" {name}", "name")
