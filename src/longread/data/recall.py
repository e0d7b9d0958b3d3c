"""Facts in training sequences, and questions about them further on: what an ordinary text rarely asks for word by word.

Half of the facts are about people, half have keys and values of the form that S-NIAH's have (adjective-noun; seven
digits, or a UUID). Wording and words are not those of `longread.evaluate.haystack`, so no test's fact is ever trained
on. Each sequence has facts of its own, drawn from the seed and its place in the epoch.

Letters: T tokens of context.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from longread.config import UserError
from longread.config.run import MOST_RECALL
from longread.data.sampler import Sampler
from longread.data.shards import TokenDataset

WORDINGS = (
    ("The {what} of {key} is {value}.", "What is the {what} of {key}? The {what} of {key} is {value}."),
    ("Take down this {what} for {key}: {value}.", "Which {what} was taken down for {key}? For {key} it was {value}."),
    ("For {key} the {what} was given as {value}.", "Give the {what} of {key} again: it was {value}."),
    ("It says here that {key} has the {what} {value}.", "Which {what} does {key} have? {key} has the {what} {value}."),
)
"""Of a fact, and of a question with its answer."""
NAMES = "Abel Agnes Basil Clara Conrad Dora Edgar Edith Felix Flora Gilbert Greta Harold Ida Jasper Lydia Martha Oscar"
SURNAMES = (
    "Abbott Barlow Carver Dalton Emery Fenwick Garland Hobson Ingram Jessop Kirby Lowell Mercer Norris Osgood Pryor"
)
ADJECTIVES = "ashen bold bronze crimson distant dull feathered fierce frozen grand hasty ivory loyal muddy noble purple"
NOUNS = (
    "badger barrel bell cabin chestnut clock cobweb drum engine fox gate hedge inkwell kite loom mill otterhound pond"
)
LEAST_DISTANCE = 32
"""Tokens between a fact and its question at least."""
NEAR = 64
"""An insertion goes between two sentences if there is such a place within so many tokens."""
MOST_FACTS = 256
"""Of a sequence, so that each can have a key of its own."""
_SENTENCE_ENDS = (b".", b"!", b"?", b"\n")
_CLOSING = b"\"')]\xe2\x80\x99\x9d"


class FactEncoder(Protocol):
    """The part of a tokenizer that is needed here; `longread.tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    def encode_inside(self, text: str) -> tuple[list[int], list[int]]: ...

    def bytes_of(self, token: int) -> bytes | None: ...


class Fact(NamedTuple):
    """A statement, and a question about it with the answer."""

    statement: str
    question: str
    key: str
    value: str


def draw_fact(draw: random.Random) -> Fact:
    """A fact of either form."""
    statement, question = draw.choice(WORDINGS)
    if draw.random() < 0.5:
        key = f"{draw.choice(NAMES.split())} {draw.choice(SURNAMES.split())}"
        what = draw.choice(("telephone number", "room number", "ticket number", "account number"))
        value = "".join(draw.choices("0123456789", k=draw.randint(4, 8)))
    else:
        key = f"{draw.choice(ADJECTIVES.split())}-{draw.choice(NOUNS.split())}"
        what, value = "secret number", str(draw.randint(10**6, 10**7 - 1))
        if draw.random() < 0.5:
            what, value = "secret uuid", str(uuid.UUID(int=draw.getrandbits(128), version=4))
    words = {"what": what, "key": key, "value": value}
    return Fact(statement.format(**words), question.format(**words), key, value)


class _Inserted(NamedTuple):
    """Tokens that go into a text, before its token `place`."""

    place: int
    tokens: list[int]


@dataclass(frozen=True)
class _Sentences:
    """Which tokens may end a sentence, and which may follow one, bool [V]."""

    ends: np.ndarray
    follows: np.ndarray

    def between(self, tokens: np.ndarray) -> np.ndarray:
        """The places between two sentences of `tokens`: tokens before each, ascending."""
        return 1 + np.flatnonzero(self.ends[tokens[:-1]] & self.follows[tokens[1:]])


class RecallSampler(Sampler):
    """A sampler whose sequences hold facts and questions about them, a share of their tokens in the mean.

    What goes in pushes as much of the text out at the end of the sequence. From fact to question it is any distance,
    each as likely, from `LEAST_DISTANCE` tokens to the length of the sequence.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        context_length: int,
        batch_size: int,
        seed: int,
        *,
        share: float,
        tokenizer: FactEncoder,
    ) -> None:
        """Raises `UserError` for what `Sampler` refuses, and a share outside of [0, `MOST_RECALL`]."""
        super().__init__(dataset, context_length, batch_size, seed)
        if not 0 <= share <= MOST_RECALL:
            raise UserError(f"recall is {share}; it must lie between 0 and {MOST_RECALL}")
        self.share, self.tokenizer = share, tokenizer
        spelled = [tokenizer.bytes_of(token) or b"" for token in range(tokenizer.vocab_size)]
        spelled += [b""] * (dataset.vocab_size - len(spelled))
        self._sentences = _Sentences(
            np.array([word.rstrip(_CLOSING).endswith(_SENTENCE_ENDS) for word in spelled]),
            np.array([word[:1].isspace() for word in spelled]),
        )

    def _window(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = super()._window(epoch, index)
        counted = np.append(True, mask)
        length = int(np.flatnonzero(counted)[-1]) + 1  # what follows is padding
        draw = random.Random(f"{self.seed} {epoch} {index}")  # noqa: S311 (no secret)
        pairs = self._pairs(draw, length)
        kept = min(length, len(tokens) - sum(len(part) for pair in pairs for part in pair))
        parts, masks, done = [], [], 0
        for place, ids in self._placed(draw, pairs, tokens[:kept]):
            parts += [tokens[done:place], np.array(ids, dtype=np.int64)]
            masks += [counted[done:place], np.ones(len(ids), dtype=bool)]
            done = place
        room = len(tokens) - sum(map(len, parts))
        text, counts = tokens[done:kept], counted[done:kept]
        padding = tokens[length:][: room - len(text)]
        return (
            np.concatenate([*parts, text, padding]),
            np.concatenate([*masks, counts, np.zeros(len(padding), dtype=bool)])[1:],
        )

    def _pairs(self, draw: random.Random, length: int) -> list[tuple[list[int], list[int]]]:
        """Facts and questions, encoded, of `share` of `length` tokens in the mean; each key once."""
        wanted, keys = self.share * length, set[str]()
        pairs: list[tuple[list[int], list[int]]] = []
        while wanted > 0 and len(pairs) < MOST_FACTS:
            fact = draw_fact(draw)
            if fact.key in keys:
                continue
            keys.add(fact.key)
            pair = _encoded(fact, draw, self.tokenizer)
            size = sum(map(len, pair))
            if not _has_room(length, size) or draw.random() * size > wanted:
                break
            pairs.append(pair)
            wanted -= size
        return pairs

    def _placed(
        self, draw: random.Random, pairs: list[tuple[list[int], list[int]]], text: np.ndarray
    ) -> list[_Inserted]:
        """Where each goes, in the order of the text; a fact before its question."""
        gaps, placed = self._sentences.between(text), []
        for statement, question in pairs:
            distance = draw.randint(LEAST_DISTANCE, len(text) - 1)
            start = draw.randint(1, len(text) - distance)
            first, second = (_nearest(gaps, place) for place in (start, start + distance))
            if second - first < LEAST_DISTANCE:
                first, second = start, start + distance
            placed += [_Inserted(first, statement), _Inserted(second, question)]
        return sorted(placed, key=lambda part: part.place)


def check_share(share: float, context_length: int, tokenizer: FactEncoder) -> None:
    """Raises `UserError` if facts cannot be `share` of full sequences: `MOST_FACTS` are less, or none has room."""
    draw = random.Random(0)  # noqa: S311 (no secret)
    size = sum(len(part) for _ in range(64) for part in _encoded(draw_fact(draw), draw, tokenizer)) / 64
    if share * context_length > MOST_FACTS * size:
        raise UserError(
            f"recall is {share}, and {MOST_FACTS} facts, the most of a sequence, are "
            f"{MOST_FACTS * size / context_length:.3f} of {context_length} tokens; lower it, or the context length"
        )
    if not _has_room(context_length, size):
        raise UserError(
            f"recall is {share}, and a fact with its question takes about {size:.0f} tokens, more than there is room "
            f"for in a context of {context_length}; give a longer one"
        )


def _encoded(fact: Fact, draw: random.Random, tokenizer: FactEncoder) -> tuple[list[int], list[int]]:
    """Statement and question, after a space or a line end."""
    before = draw.choice(" \n")
    statement, question = (tokenizer.encode_inside(before + text)[0] for text in fact[:2])
    return statement, question


def _has_room(length: int, size: float) -> bool:
    """Whether a text of `length` tokens takes in a fact and its question, `size` together."""
    return size + 2 * LEAST_DISTANCE <= length * MOST_RECALL


def _nearest(gaps: np.ndarray, place: int) -> int:
    nearest = int(gaps[np.abs(gaps - place).argmin()]) if len(gaps) else place
    return nearest if abs(nearest - place) <= NEAR else place
