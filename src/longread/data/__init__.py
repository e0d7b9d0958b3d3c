"""Token shards and the batches drawn from them.

`prepare` turns texts or token arrays into shards, `TokenDataset` opens them, `Sampler` draws batches, `RecallSampler`
draws them with facts to recall. `TextFile` and `decode_text` are how any text is read, and `TextFormat` says what may
differ.
"""

from __future__ import annotations

from longread.data.documents import read_pieces, read_texts
from longread.data.locate import TextFile, Unreadable, open_texts
from longread.data.prepare import PrepareProgress, TextEncoder, prepare
from longread.data.recall import RecallSampler
from longread.data.sampler import Batch, Sampler
from longread.data.shards import Documents, TokenDataset
from longread.data.staging import finish_replacement
from longread.data.text import NotText, TextFormat, decode_text

__all__ = [
    "Batch",
    "Documents",
    "NotText",
    "PrepareProgress",
    "RecallSampler",
    "Sampler",
    "TextEncoder",
    "TextFile",
    "TextFormat",
    "TokenDataset",
    "Unreadable",
    "decode_text",
    "finish_replacement",
    "open_texts",
    "prepare",
    "read_pieces",
    "read_texts",
]
