"""S-NIAH: one needle in a haystack, as RULER defines it (arXiv 2404.06654, NVIDIA/RULER), made without a download.

| variant | haystack | key | value |
|---|---|---|---|
| S-NIAH-1 | one line of noise, repeated | adjective-noun | number of 7 digits |
| S-NIAH-2 | essays: any text the user names | adjective-noun | number of 7 digits |
| S-NIAH-3 | essays | adjective-noun | UUID |

Instruction, noise, needle, question and the beginning of the answer are worded as in RULER. Three things differ. The
haystack is cut to the token, so that all prompts of one context length can be read side by side. The context length
is that of the prompt alone; RULER's includes the tokens of the answer. The words for keys are our own. The parts of
a prompt are encoded one by one: each begins with the white space before it, where tokenizers split anyway.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from longread.config import UserError
from longread.tokenizer import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INSTRUCTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)
Probe = Literal["question", "verbatim"]
"""How a prompt ends: with the question as asked, or with the needle's own words up to its value."""
ADJECTIVES = (
    "amber ample brisk calm clever coral crisp dusty eager early fabled faint gentle glossy golden hollow humble "
    "icy jolly keen lively lunar mellow misty modest narrow nimble odd olive pale patient plain polite proud "
    "quiet rapid rustic scarlet shy silent silver sleepy sober solemn spry steady stern sunny tender tidy upper "
    "velvet vivid warm wicker windy wise witty woolen young"
)
NOUNS = (
    "acorn anchor apron badge banjo basket beacon bridge bucket candle canyon carpet cedar comet cradle dagger "
    "desk dolphin easel falcon feather fiddle flute forest garnet glacier hammer harbor helmet island jacket "
    "kettle ladder lantern lemon locket magnet mantle meadow mirror needle orchard otter paddle parcel pebble "
    "pillow plum quarry rabbit ribbon saddle sparrow spoon thimble tunnel turnip umbrella valley violin walnut "
    "willow window zither"
)
NEAR, NEAR_SHARE = 128, 0.05
"""A needle goes between two sentences if that moves it by at most so many tokens, or this share of the haystack."""
_SENTENCE_END = re.compile(r"[.!?][\"')\]’”]*(?=\s|$)")


class Variant(NamedTuple):
    """One of RULER's three single-needle tasks."""

    number: int
    haystack: Literal["noise", "essay"]
    value: Literal["number", "uuid"]

    @property
    def name(self) -> str:
        return f"S-NIAH-{self.number}"


VARIANTS = {
    1: Variant(1, "noise", "number"),
    2: Variant(2, "essay", "number"),
    3: Variant(3, "essay", "uuid"),
}


@dataclass(frozen=True, slots=True)
class Haystack:
    """Tokens to hide a needle in, and the places between its sentences: tokens before each, ascending, 0 included."""

    tokens: np.ndarray
    gaps: np.ndarray
    varied: bool
    """Whether each sample begins at another sentence; noise is the same everywhere."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt: `tokens` int64 [T], and where its needle lies, tokens start … end - 1."""

    variant: Variant
    depth: float
    key: str
    value: str
    tokens: np.ndarray
    needle_start: int
    needle_end: int
    probe: Probe = "question"

    @property
    def context_length(self) -> int:
        return len(self.tokens)


def noise(tokenizer: Tokenizer, longest: int) -> Haystack:
    """RULER's noise, at least `longest` tokens of it. Raises `UserError` if the tokenizer makes no tokens of it.

    Four lines are encoded, and the tokens of one of the inner lines are repeated: all inner lines are alike.
    """
    line = "\n" + NOISE
    n = len(tokenizer.encode(line * 4)) - len(tokenizer.encode(line * 3))
    if n < 1:
        raise UserError("the tokenizer makes no tokens of an English sentence; it cannot be tested with S-NIAH-1")
    four, copies = _haystack(tokenizer, line * 4, r"\.(?=\n|$)", varied=False), longest // n
    inner = four.gaps[(four.gaps > n) & (four.gaps <= 2 * n)]
    repeated = (inner + n * np.arange(1, copies + 1)[:, None]).ravel()
    gaps = (four.gaps[four.gaps <= 2 * n], repeated, four.gaps[four.gaps > 2 * n] + n * copies)
    tokens = (four.tokens[: 2 * n], np.tile(four.tokens[n : 2 * n], copies), four.tokens[2 * n :])
    return Haystack(np.concatenate(tokens), np.concatenate(gaps), varied=False)


def essays(texts: Iterable[str], tokenizer: Tokenizer, longest: int, *, repeat: bool = False) -> Haystack:
    """Texts one after the other as a haystack for contexts of up to `longest` tokens; white space becomes one space.

    Of texts that are much longer only the beginning is used.

    Raises:
        UserError: the texts are shorter than `longest` tokens and may not be repeated, or hold nothing at all.
    """
    pieces: list[Haystack] = []
    total = 0
    for text in texts:
        if words := text.split():
            pieces.append(_haystack(tokenizer, " " + " ".join(words), _SENTENCE_END.pattern, varied=True))
            total += len(pieces[-1].tokens)
        if total >= 16 * longest:
            break
    if not total:
        raise UserError("the haystack holds no words; name a text with --haystack")
    if total < longest and not repeat:
        raise UserError(
            f"the haystack has {total:,} tokens, fewer than the context of {longest:,}; "
            "give more text, shorter contexts or --repeat-haystack"
        )
    pieces *= -(-longest // total)
    offsets = np.cumsum([0] + [len(piece.tokens) for piece in pieces])
    gaps = [piece.gaps + offset for piece, offset in zip(pieces, offsets[:-1], strict=True)]
    return Haystack(np.concatenate([p.tokens for p in pieces]), np.unique(np.concatenate(gaps)), varied=True)


def make_samples(
    tokenizer: Tokenizer,
    variant: Variant,
    haystack: Haystack,
    context_length: int,
    depths: Sequence[float],
    per_depth: int,
    seed: int,
    probe: Probe = "question",
) -> list[Sample]:
    """`per_depth` prompts of exactly `context_length` tokens for each depth (0: needle first, 1: needle last).

    Probe "verbatim" tells storage from addressing: after the haystack come the needle's own words up to the value, so
    that what was stored is met by what it was stored with. Keys and values are those of the question.

    A sample depends on its own variant, length, depth, number and `seed`, not on what else is asked for.

    Raises:
        UserError: instruction, needle and question alone are longer than the context.
    """
    return [
        _sample(tokenizer, variant, haystack, context_length, depth, draw, probe)
        for depth, draw in _draws(variant, context_length, depths, per_depth, seed)
    ]


def check_context(
    tokenizer: Tokenizer,
    variant: Variant,
    context_length: int,
    depths: Sequence[float],
    per_depth: int,
    seed: int,
    probe: Probe = "question",
) -> None:
    """Raises the `UserError` of `make_samples` with the same arguments, before there is a haystack."""
    for _, draw in _draws(variant, context_length, depths, per_depth, seed):
        _parts(tokenizer, variant, context_length, draw, probe)


def _draws(
    variant: Variant, context_length: int, depths: Sequence[float], per_depth: int, seed: int
) -> Iterator[tuple[float, random.Random]]:
    """The depth of each sample, and what all of it is drawn with."""
    for depth in depths:
        for i in range(per_depth):
            yield depth, random.Random(f"{seed} {variant.number} {context_length} {depth} {i}")  # noqa: S311 (no secret)


class _PromptParts(NamedTuple):
    """Of a prompt all but the haystack, which has `room` tokens."""

    key: str
    value: str
    head: list[int]
    needle: list[int]
    question: list[int]
    room: int


def _parts(
    tokenizer: Tokenizer, variant: Variant, context_length: int, draw: random.Random, probe: Probe
) -> _PromptParts:
    key = f"{draw.choice(ADJECTIVES.split())}-{draw.choice(NOUNS.split())}"
    if variant.value == "number":
        value = str(draw.randint(10**6, 10**7 - 1))
    else:
        value = str(uuid.UUID(int=draw.getrandbits(128), version=4))
    words = {"kind": variant.value, "key": key, "value": value}
    between = "\n" if variant.haystack == "noise" else " "
    head = tokenizer.encode(INSTRUCTION.format(**words) + ("" if variant.haystack == "noise" else "\n"))
    head = tokenizer.beginning + head
    needle, _ = tokenizer.encode_inside(between + NEEDLE.format(**words))
    asked = QUESTION if probe == "question" else between + NEEDLE.partition(" {value}")[0]
    question, _ = tokenizer.encode_inside(asked.format(**words))
    room = context_length - len(head) - len(needle) - len(question)
    if room < 0:
        raise UserError(
            f"a context of {context_length} tokens is too short for the needle: instruction, needle and question of "
            f"{variant.name} take {context_length - room}; give at least --contexts {context_length - room + 64}"
        )
    return _PromptParts(key, value, head, needle, question, room)


def _sample(
    tokenizer: Tokenizer,
    variant: Variant,
    haystack: Haystack,
    context_length: int,
    depth: float,
    draw: random.Random,
    probe: Probe,
) -> Sample:
    key, value, head, needle, question, room = _parts(tokenizer, variant, context_length, draw, probe)
    starts = haystack.gaps[haystack.gaps <= len(haystack.tokens) - room]
    first = int(draw.choice(starts.tolist())) if haystack.varied else 0
    place = _place(haystack.gaps - first, room, depth)
    hay = haystack.tokens[first : first + room].tolist()
    start = len(head) + place
    tokens = np.array([*head, *hay[:place], *needle, *hay[place:], *question], dtype=np.int64)
    return Sample(variant, depth, key, value, tokens, start, start + len(needle), probe)


def _place(gaps: np.ndarray, room: int, depth: float) -> int:
    """Tokens of the haystack before the needle: the gap nearest to its depth, if one is near."""
    wanted = round(depth * room)
    gaps = gaps[(gaps >= 0) & (gaps <= room)]
    nearest = int(gaps[np.abs(gaps - wanted).argmin()]) if len(gaps) else wanted
    return nearest if abs(nearest - wanted) <= max(NEAR, NEAR_SHARE * room) else wanted


def _haystack(tokenizer: Tokenizer, text: str, sentence_end: str, *, varied: bool) -> Haystack:
    """Encodes a text and finds the ends of tokens that are also ends of sentences."""
    ids, byte_lengths = tokenizer.encode_with_bytes(text)
    token_ends = np.cumsum(byte_lengths)
    bytes_before = np.cumsum([0] + [len(character.encode()) for character in text])
    sentence_ends = bytes_before[[match.end() for match in re.finditer(sentence_end, text)]]
    gaps = np.concatenate([[0], 1 + np.flatnonzero(np.isin(token_ends, sentence_ends))])
    return Haystack(np.array(ids, dtype=np.int64), gaps.astype(np.int64), varied)
