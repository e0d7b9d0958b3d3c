"""The tokens of a text never depend on how it arrived."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from longread.config import UserError
from longread.tokenizer import StreamEncoder, Tokenizer
from longread.tokenizer.contract import Cut
from tests.tokenizer_kinds import KINDS, hard_text, tokenizer_of

UNCUT = {"nothing can be cut", "unigram without words"}


def streamed(tokenizer: Tokenizer, pieces: list[str]) -> tuple[list[int], list[int]]:
    encoder = StreamEncoder(tokenizer)
    ids: list[int] = []
    lengths: list[int] = []
    for found, covered in [*map(encoder.push, pieces), encoder.close()]:
        ids += found
        lengths += covered
    return ids, lengths


def cut(text: str, draw: Random) -> list[str]:
    """Pieces of about one size, which may be 1."""
    pieces, begin, size = [], 0, draw.choice([1, 7, 60, 300, 1000, 5000])
    while begin < len(text):
        end = begin + draw.randrange(1, 2 * size)
        pieces.append(text[begin:end])
        begin = end
    return pieces


def check_pieces(kind: str, seed: int) -> None:
    draw = Random(seed)
    text = hard_text(draw, draw.choice([1, 300, 2000, 6000]))
    tokenizer = tokenizer_of(kind)
    ids, lengths = tokenizer.encode_with_bytes(text)
    assert ids == tokenizer.encode(text)
    assert sum(lengths) == len(text.encode()) or not ids
    assert streamed(tokenizer, cut(text, draw)) == (ids, lengths)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pieces_give_the_tokens_of_the_whole(kind: str, seed: int) -> None:
    check_pieces(kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_many_pieces_give_the_tokens_of_the_whole(kind: str, seed: int) -> None:
    check_pieces(kind, seed)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNCUT))
def test_ordinary_text_waits_for_little_of_what_follows(kind: str) -> None:
    """What waits and what is encoded again are short, however long the text and however small its pieces."""
    tokenizer, encoder = tokenizer_of(kind), StreamEncoder(tokenizer_of(kind))
    text = "The tide comes in, and the gulls don't mind 12 of 1999. She said: no!\n" * 100
    encoded, encode = 0, tokenizer.encode_with_bytes

    def counting(part: str) -> tuple[list[int], list[int]]:
        nonlocal encoded
        encoded += len(part)
        return encode(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "encode_with_bytes", counting)
        covered = sum(sum(encoder.push(text[i : i + 500])[1]) for i in range(0, len(text), 500))
    assert covered > len(text) - 700
    assert encoded < 2.5 * len(text)


@pytest.mark.parametrize(
    "kind",
    [
        *("digits from the right", "phrases", "gpt-4o"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama 3", "deepseek")),
    ],
)
@pytest.mark.parametrize("run", ["234567", "tide comes in", "don't they'll ", "   \n", "\u0301\u0323"])
def test_what_comes_later_changes_nothing_that_was_given(kind: str, run: str) -> None:
    """The text ends anywhere inside of what belongs together, for as long as nobody knows how it goes on."""
    tokenizer, text = tokenizer_of(kind), "So it is said: " + run * 150
    ids, _ = tokenizer.encode_with_bytes(text)
    for length in range(600, 600 + len(run)):
        encoder = StreamEncoder(tokenizer)
        begun = encoder.push(text[:length])[0]
        assert begun == ids[: len(begun)]
        for rest in ("7", "e", "'t"):
            other = StreamEncoder(tokenizer)
            first = other.push(text[:length])[0]
            assert first + other.push(rest)[0] + other.close()[0] == tokenizer.encode(text[:length] + rest)


@pytest.mark.parametrize("kind", sorted(UNCUT))
def test_a_tokenizer_without_places_to_cut_waits_for_all(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    encoder = StreamEncoder(tokenizer)
    assert [encoder.push("ab" * 1000) for _ in range(9)] == [([], [])] * 9
    assert encoder.close() == tokenizer.encode_with_bytes("ab" * 9000)


@pytest.mark.parametrize("kind", ["own bpe", "llama 2", "digits from the right"])
@pytest.mark.parametrize("run", ["a", " ", "1", "\n", "\u0301"])
def test_a_long_run_is_looked_at_a_few_times_only(kind: str, run: str) -> None:
    """Wherever it cannot be cut, the next look waits until it has doubled."""
    tokenizer, text = tokenizer_of(kind), "so " + run * 7_000 + " it goes"
    looks, last_cut = [], tokenizer.last_cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "last_cut", lambda t, known: looks.append(len(t)) or last_cut(t, known))
        got = streamed(tokenizer, [text[i : i + 50] for i in range(0, len(text), 50)])
    assert got == tokenizer.encode_with_bytes(text)
    assert sum(looks) < 3 * len(text)


class FarSighted(Tokenizer):
    """Its tokens are letters, and capitals after an x anywhere before; its cuts know nothing of that."""

    vocab_size, bos_id, fingerprint = 256, None, "far"

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 32 * ("x" in text[:i]) for i, c in enumerate(text)]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text), [1] * len(text)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(map(chr, ids)).lower()

    def save(self, directory: Path) -> None: ...

    def last_cut(self, text: str, known: int) -> Cut | None:
        place = len(text) - 10
        return Cut(place, place - 5, self.encode(text)[place - 5 : place], 5)


def test_tokens_that_turn_out_other_than_they_were_are_never_given() -> None:
    encoder = StreamEncoder(FarSighted())
    with pytest.raises(UserError, match="this tokenizer's tokens depend on text far away"):
        encoder.push(("x" + "a" * 70_000) * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_cut_for_a_batch_has_the_tokens_of_the_whole(kind: str) -> None:
    draw, tokenizer = Random(7), tokenizer_of(kind)
    text = hard_text(draw, 5000)
    stretches = list(tokenizer.cut(cut(text, draw), 400))
    assert "".join(stretch.text for stretch in stretches) == text
    assert [i for ids in tokenizer.encode_cut(stretches) for i in ids] == tokenizer.encode(text)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="half a surrogate pair"):
        StreamEncoder(tokenizer_of("own bpe")).push("a\ud83e")


MARKS = [kind for kind in KINDS if kind.startswith(("metaspace", "llama 2", "unigram", "gpt-2 with"))]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {*MARKS, *UNCUT, "fixed length", "scripts"}))
def test_without_a_mark_a_text_that_goes_on_is_any_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for text in ("the tide", " the tide", "\n\nthe tide", "  é gull.", "1234567", ".", ""):
        assert tokenizer.encode_inside(text) == tokenizer.encode_with_bytes(text), text


def test_spaces_are_not_doubled_where_a_text_goes_on() -> None:
    for kind in ("llama 2", "metaspace first", "gpt-2 with a space first"):
        tokenizer = tokenizer_of(kind)
        halves = tokenizer.encode("the tide") + tokenizer.encode_inside(" comes in")[0]
        assert tokenizer.decode(halves).strip() == "the tide comes in"
        assert tokenizer.decode(tokenizer.encode("the tide") + tokenizer.encode(" comes in")).count("  ") <= 1
        glued = tokenizer.encode("the ti") + tokenizer.encode_inside("de")[0]
        assert tokenizer.decode(glued).strip() == "the tide"
