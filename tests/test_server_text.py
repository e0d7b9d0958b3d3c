"""Token ids as text that goes out in pieces, and losses in bins."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from longread.engine import Token
from longread.server.choices import Writer, stops_of, token_bytes, token_text
from longread.server.errors import ApiError
from longread.server.sessions.losses import Losses
from longread.tokenizer import ByteTokenizer, Tokenizer, train_bpe

BYTES = ByteTokenizer()
BPE = train_bpe(["She said – “naïve” – and left. " * 20], 280)


def token(i: int) -> Token:
    return Token(i, -1.0, [], 0)


def written(tokenizer: Tokenizer, ids: list[int], stops: list[str] = []) -> tuple[str, list[int], Writer]:  # noqa: B006
    """Text, offsets and the writer after all tokens."""
    writer = Writer(tokenizer, stops)
    pieces = []
    for i in ids:
        pieces.append(writer.push(token(i)))
        if writer.stopped:
            break
    pieces.append(writer.close())
    shown = [t.id for piece in pieces for t in piece.tokens]
    assert shown == ids[: len(shown)]
    text = "".join(piece.text for piece in pieces)
    assert text == writer.text
    offsets = [offset for piece in pieces for offset in piece.offsets]
    assert offsets == sorted(offsets)
    assert len(offsets) == len(shown)
    return text, offsets, writer


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_comes_out_as_it_went_in(text: str) -> None:
    for tokenizer in (BYTES, BPE):
        assert written(tokenizer, tokenizer.encode(text))[0] == text


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_lose_nothing_that_is(data: bytes) -> None:
    text, offsets, _ = written(BYTES, list(data))
    assert [c for c in text if c != "\N{REPLACEMENT CHARACTER}"] == [
        c for c in data.decode(errors="replace") if c != "\N{REPLACEMENT CHARACTER}"
    ]
    assert len(offsets) == len(data)


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    """The first that is complete, and of those that end together the longest."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    found, _, writer = written(BYTES, BYTES.encode(text), stops)
    assert found == expected
    assert writer.stopped == bool(ends)


def test_a_token_that_ends_in_a_stop_counts_as_written_once_its_text_is() -> None:
    writer = Writer(BPE, ["left"])
    ids = BPE.encode("and left. ")
    pieces = [writer.push(token(i)) for i in ids if not writer.stopped]
    assert "".join(piece.text for piece in pieces) == "and "
    assert BPE.decode([t.id for piece in pieces for t in piece.tokens]).startswith("and")
    assert writer.close().tokens == []


def test_offsets_are_where_tokens_begin() -> None:
    _, offsets, _ = written(BYTES, BYTES.encode("aéb"))
    assert offsets == [0, 1, 1, 2]


def test_what_the_tokenizer_does_not_know_has_no_text() -> None:
    text, _, _ = written(BYTES, [97, 300, 256, 98])
    assert text == "ab"
    assert [token_text(BYTES, i) for i in (97, 0xE2, 256, 300)] == ["a", "bytes:\\xe2", "token_id:256", "token_id:300"]
    assert [token_bytes(BYTES, i) for i in (97, 0xE2, 256)] == [[97], [0xE2], None]


def test_stops_are_few_and_not_empty() -> None:
    assert (stops_of(None), stops_of("a"), stops_of(["a", "b"])) == ([], ["a"], ["a", "b"])
    for wrong in ("", ["a", ""], ["a"] * 5, "x" * 1001):
        with pytest.raises(ApiError):
            stops_of(wrong)


@given(
    st.integers(0, 20),
    st.integers(1, 7),
    st.lists(st.lists(st.floats(0, 9), max_size=9), max_size=6),
    st.booleans(),
)
def test_bins_hold_every_token_once(start: int, size: int, pieces: list[list[float]], twin: bool) -> None:
    nll = [value for piece in pieces for value in piece]
    losses = Losses(start, [1] * len(nll), bin_size=size, total=len(nll), twin=twin)
    starts: list[int] = []
    tokens: list[int] = []
    sums = 0.0
    for number in range(len(pieces) + 1):
        final = number == len(pieces)
        if not final:
            losses.add(pieces[number])
            losses.add_frozen(pieces[number])
        bins = losses.new_bins(final=final)
        assert bins is not None
        starts += bins["start"]
        tokens += bins["tokens"]
        sums += sum(n * mean for n, mean in zip(bins["tokens"], bins["nll"], strict=True))
        assert bins["frozen_nll"] == (bins["nll"] if twin else None)
    assert sum(tokens) == len(nll)
    assert sums == pytest.approx(sum(nll))
    place = start
    for first, count in zip(starts, tokens, strict=True):
        assert first == place
        assert first // size == (first + count - 1) // size
        place += count


def test_bits_count_the_bytes_of_what_was_predicted() -> None:
    losses = Losses(0, [0, 1, 3], bin_size=None, total=3, twin=False)
    losses.add([math.nan, math.log(2), 3 * math.log(2)])
    assert losses.means()["bits_per_byte"] == pytest.approx(1.0)
    assert losses.means()["nll"] == pytest.approx(2 * math.log(2))
    assert losses.new_bins(final=True) is None
