"""Training a byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers

from longread.config import UserError
from longread.tokenizer.contract import utf8
from longread.tokenizer.hugging_face import BOS, HuggingFaceTokenizer

_SMALLEST = 258  # 256 bytes, BOS, one merge


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE with BOS "<|bos|>": the same texts give the same tokenizer, and any text survives a round trip.

    `vocab_size` is an upper limit: a small text has no more merges to offer. `texts` is read once, as a stream.
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
        show_progress=False,
    )
    seen = 0

    def stream() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(utf8(text))
            yield text

    tokenizer.train_from_iterator(stream(), trainer)
    if not seen:
        raise UserError("there is no text to train a tokenizer on; give at least one text that is not empty")
    return HuggingFaceTokenizer(tokenizer, BOS)
