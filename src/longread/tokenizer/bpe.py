"""Training a byte-level BPE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import tokenizers

from longread.config import UserError
from longread.tokenizer.contract import utf8
from longread.tokenizer.hugging_face import BOS, HuggingFaceTokenizer

_SMALLEST = 258  # 256 bytes, BOS, one merge
LONGEST_WORD = 256
_MAY_BE_LONG = re.compile(rf"[^\W_]{{{LONGEST_WORD}}}|(?:[^\w\s]|_){{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
"""Runs that hold every longer word: of letters and digits, of signs, of white space."""


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> HuggingFaceTokenizer:
    """A byte-level BPE with BOS "<|bos|>": the same texts give the same tokenizer, and any text survives a round trip.

    `vocab_size` is an upper limit: a small text has no more merges to offer. `texts` is read once, as a stream. Of a
    word of more than LONGEST_WORD characters, parts of that length are learned from, so that the time is linear in the
    text. `show_progress`: on stderr.
    """
    if vocab_size < _SMALLEST:
        raise UserError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least {_SMALLEST}")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=show_progress,
    )
    seen = 0

    def stream() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(utf8(text))
            yield from _without_long_words(text, byte_level)

    tokenizer.train_from_iterator(stream(), trainer)
    if not seen:
        raise UserError("there is no text to train a tokenizer on; give at least one text that is not empty")
    return HuggingFaceTokenizer(tokenizer, BOS)


def _without_long_words(text: str, words: tokenizers.pre_tokenizers.PreTokenizer) -> Iterator[str]:
    """The text, cut inside of words that are longer than LONGEST_WORD and nowhere else."""
    if not _MAY_BE_LONG.search(text):
        yield text
        return
    begun = 0
    for _, (start, end) in words.pre_tokenize_str(text):
        for place in range(start + LONGEST_WORD, end, LONGEST_WORD):
            yield text[begun:place]
            begun = place
    yield text[begun:]
