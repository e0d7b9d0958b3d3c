"""The tokens of a text never depend on how it arrived."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from longread.tokenizer import StreamEncoder, Tokenizer
from tests.tokenizer_kinds import KINDS, hard_text, tokenizer_of


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


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pieces_give_the_tokens_of_the_whole(kind: str, seed: int) -> None:
    draw = Random(seed)
    text = hard_text(draw, draw.choice([1, 300, 2000, 6000]))
    tokenizer = tokenizer_of(kind)
    ids, lengths = tokenizer.encode_with_bytes(text)
    assert ids == tokenizer.encode(text)
    assert sum(lengths) == len(text.encode()) or not ids
    assert streamed(tokenizer, cut(text, draw)) == (ids, lengths)
