"""Text of ids that come one by one: that of all of them, as early as it is certain."""

from __future__ import annotations

import os
from random import Random

import pytest
import tokenizers
from hypothesis import example, given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers

from longread.tokenizer import ByteTokenizer, HuggingFaceTokenizer, StreamDecoder, Tokenizer, decoded
from tests.tokenizer_kinds import KINDS, hard_text, tokenizer_of

BYTES = ByteTokenizer()


def pieces(
    tokenizer: Tokenizer, ids: list[int], stops: list[str] | None = None, before: list[int] | None = None
) -> list[str]:
    decoder = StreamDecoder(tokenizer, before=before or (), stops=stops or ())
    return [*map(decoder.push, ids), decoder.close()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pieces_are_the_text_of_all_ids(kind: str, seed: int) -> None:
    draw, tokenizer = Random(seed), tokenizer_of(kind)
    drawn = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(40))]
    ids = tokenizer.encode(hard_text(draw, draw.randrange(200)))[:300] + drawn
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
@example(seed=32768)  # for some kinds, a run of bytes that is cut: with its last character all of it becomes unreadable
def test_what_goes_on_is_what_the_whole_would_have_there(kind: str, seed: int) -> None:
    """Unless the whole would have something else before, as nobody could know who had only that."""
    draw, tokenizer = Random(seed), tokenizer_of(kind)
    ids = tokenizer.encode(hard_text(draw, draw.randrange(200)))[:300]
    place = draw.randrange(len(ids) + 1)
    before, whole = tokenizer.decode(ids[:place]), tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in before and whole.startswith(before):
        assert before + "".join(pieces(tokenizer, ids[place:], before=ids[:place])) == whole


@given(st.binary(max_size=40))
def test_bytes_wait_exactly_while_they_can_become_a_character(data: bytes) -> None:
    decoder, given_ = StreamDecoder(BYTES), ""
    for n, byte in enumerate(data, start=1):
        given_ += decoder.push(byte)
        endings = {data[:n].decode(errors="replace"), (data[:n] + b"a").decode(errors="replace")}
        endings |= {(data[:n] + bytes([x, 0x80, 0x80])).decode(errors="replace") for x in range(0x80, 0xC0)}
        certain = os.path.commonprefix(list(endings))  # noqa: RUF071
        assert given_ == certain
    assert given_ + decoder.close() == data.decode(errors="replace")


def test_many_tokens_may_lie_between_two_whole_characters() -> None:
    """Each token ends inside a character: nothing is whole before the end."""
    letters = [chr(c) for c in range(0x0904, 0x0939)]  # all begin with the same two bytes and have one more
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [byte_level.pre_tokenize_str(letter)[0][0] for letter in letters]
    first, second = spelled[0][:2]
    lasts = sorted({word[2] for word in spelled})
    merges = [(last, first) for last in lasts] + [(last + first, second) for last in lasts]
    vocabulary = sorted(byte_level.alphabet()) + [one + other for one, other in merges]
    raw = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    raw.pre_tokenizer, raw.decoder = byte_level, decoders.ByteLevel()
    tokenizer = HuggingFaceTokenizer(raw)
    text = "".join(Random(3).choices(letters, k=1500))
    ids = tokenizer.encode(text)
    whole = [tokenizer.decode(ids[:i])[-1] != "\N{REPLACEMENT CHARACTER}" for i in range(1, len(ids), 7)]
    assert len(ids) > 1000
    assert not any(whole)
    assert "".join(pieces(tokenizer, ids)) == text


def test_words_keep_their_spaces() -> None:
    for kind in ("llama 2", "metaspace first", "unigram", "bert"):
        tokenizer = tokenizer_of(kind)
        assert "".join(pieces(tokenizer, tokenizer.encode("the tide the tide"))) == "the tide the tide"


def test_a_run_of_single_bytes_is_text_at_its_end() -> None:
    """Byte fallback: one wrong byte makes all of a run U+FFFD, so none of it is certain before."""
    tokenizer = tokenizer_of("llama 2")
    fox, a = tokenizer.encode("🦊")[-4:], tokenizer.encode("the")[-1]
    assert pieces(tokenizer, [*fox, *fox, a])[:-1] == [""] * 8 + ["🦊🦊 the"]
    assert pieces(tokenizer, [*fox, fox[0], a])[:-1] == [""] * 5 + ["\N{REPLACEMENT CHARACTER}" * 5 + " the"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcd", [], "abcd"),
        ("abcd", ["bc"], "a"),
        ("abac", ["ac"], "ab"),
        ("one two three", ["three", "two"], "one "),
        ("xy", ["yz"], "xy"),
        ("abcde", ["bcde", "c"], "ab"),
        ("abcde", ["cd", "bcd"], "a"),
        ("aaab", ["aab"], "a"),
    ],
)
def test_text_ends_before_the_first_stop_that_is_complete(text: str, stops: list[str], expected: str) -> None:
    for tokenizer in (BYTES, tokenizer_of("own bpe"), tokenizer_of("llama 2")):
        decoder = StreamDecoder(tokenizer, stops=stops)
        got = [*map(decoder.push, tokenizer.encode(text)), decoder.close()]
        assert "".join(got) == expected
        assert decoder.stopped == (expected != text)


@pytest.mark.parametrize("kind", ["own bpe", "llama 2", "bert"])
def test_ids_are_decoded_piece_by_piece(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("oak elm é 🦊 oak")
    pieces = list(decoded(iter(ids), tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 1
    assert all(pieces)
    assert list(decoded([], tokenizer)) == []
    later = "".join(decoded(ids[2:], tokenizer, before=ids[:2]))
    assert tokenizer.decode(ids[:2]) + later == tokenizer.decode(ids)


def test_after_a_stop_nothing_is_given() -> None:
    decoder = StreamDecoder(BYTES, stops=["."])
    assert [*map(decoder.push, b"a.b"), decoder.close()] == ["a", "", "", ""]


@pytest.mark.parametrize("kind", ["own bpe", "llama 2", "bert"])
def test_the_work_for_a_token_does_not_grow(kind: str) -> None:
    """Counted in ids that are decoded, not in time."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("the tide comes in, é 🦊 and the gulls go. " * 30)
    work, decode = [0], tokenizer.decode

    def counting(these: list[int]) -> str:
        work[0] += len(these)
        return decode(these)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "decode", counting)
        assert "".join(pieces(tokenizer, ids)) == decode(ids)
    assert work[0] < 60 * len(ids)


def test_ids_without_text() -> None:
    assert "".join(pieces(BYTES, [97, 300, 256, 98])) == "ab"
