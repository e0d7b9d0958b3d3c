"""Text to token ids and back: bytes, or any Hugging Face tokenizer file.

No tokenizer adds a beginning-of-sequence token (BOS) to what it encodes, and no text can smuggle one in: a special
token spelled out in a text is encoded as the characters that it is. Whoever starts a document prepends `beginning`.

A text that arrives in pieces goes through `StreamEncoder`, token ids that come one by one through `StreamDecoder`: both
give what the whole would give, wherever it is cut.
"""

from __future__ import annotations

from longread.tokenizer.bpe import train_bpe
from longread.tokenizer.byte import ByteTokenizer
from longread.tokenizer.contract import StreamEncoder, Tokenizer
from longread.tokenizer.decoding import StreamDecoder, decoded
from longread.tokenizer.definition import FILE_NAME
from longread.tokenizer.hugging_face import BOS, HuggingFaceTokenizer
from longread.tokenizer.loading import copy_tokenizer, load_tokenizer

__all__ = [
    "BOS",
    "FILE_NAME",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "StreamDecoder",
    "StreamEncoder",
    "Tokenizer",
    "copy_tokenizer",
    "decoded",
    "load_tokenizer",
    "train_bpe",
]
