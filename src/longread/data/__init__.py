"""Token shards and the batches drawn from them.

`prepare` turns texts or token arrays into shards, `TokenDataset` opens them, `Sampler` draws batches.
"""

from __future__ import annotations

from longread.data.prepare import Progress, TextEncoder, prepare, read_texts
from longread.data.sampler import Batch, Sampler
from longread.data.shards import Documents, TokenDataset

__all__ = ["Batch", "Documents", "Progress", "Sampler", "TextEncoder", "TokenDataset", "prepare", "read_texts"]
