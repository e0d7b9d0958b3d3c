"""Token shards and the batches drawn from them.

`prepare` turns texts or token arrays into shards, `TokenDataset` opens them, `Sampler` draws batches; `decode_text` is
how any text file is read.
"""

from __future__ import annotations

from longread.data.decoding import NotText, decode_text
from longread.data.prepare import Progress, TextEncoder, prepare, read_texts
from longread.data.sampler import Batch, Sampler
from longread.data.shards import Documents, TokenDataset
from longread.data.staging import finish_replacement

__all__ = [
    "Batch",
    "Documents",
    "NotText",
    "Progress",
    "Sampler",
    "TextEncoder",
    "TokenDataset",
    "decode_text",
    "finish_replacement",
    "prepare",
    "read_texts",
]
