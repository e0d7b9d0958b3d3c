"""Documents to evaluate on, in the tokens of one model: those of a data set, or of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longread.cli.models import OpenModel
from longread.config import UserError
from longread.data import TokenDataset, finish_replacement, read_texts
from longread.evaluate import Document
from longread.tokenizer import Tokenizer


def read_documents(
    paths: Sequence[str],
    opened: OpenModel,
    *,
    first: int | None = None,
    min_tokens: int = 2,
    max_tokens: int | None = None,
    asked_by: str = "--min-tokens",
) -> list[Document]:
    """The `first` documents of at least `min_tokens`, cut to `max_tokens`; `asked_by` set the minimum.

    Raises:
        UserError: there is none, or they are tokens of another tokenizer.
    """
    found = _of_dataset(paths[0], opened) if len(paths) == 1 else None
    documents = found if found is not None else _of_texts(paths, opened)
    kept = [
        Document(name, tokens[:max_tokens], None if lengths is None else lengths[:max_tokens])
        for name, tokens, lengths in documents
        if len(tokens) >= min_tokens
    ][:first]
    if not kept:
        raise UserError(f"no document has {min_tokens} tokens; lower {asked_by} or give longer texts")
    return kept


def _of_dataset(path: str, opened: OpenModel) -> list[Document] | None:
    """The documents of a data set; None if there is none at `path`."""
    finish_replacement(Path(path))
    if not (Path(path) / "index.json").is_file():
        return None
    dataset = TokenDataset.open(path)
    if dataset.tokenizer_fingerprint not in (None, opened.tokenizer.fingerprint):
        raise UserError(f"{path} was prepared with another tokenizer than {opened.name}; give the texts themselves")
    documents = []
    for i in range(dataset.num_documents):
        tokens = dataset.document(i)
        documents.append(Document(dataset.document_name(i), tokens, _byte_lengths(tokens, opened.tokenizer)))
    return documents


def _byte_lengths(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token covers; None where the text cannot be told from the tokens."""
    ids = tokens.tolist()
    bos = ids[:1] if ids[:1] == [tokenizer.bos_id] else []
    again, lengths = tokenizer.encode_with_bytes(tokenizer.decode(ids[len(bos) :]))
    return np.array([0] * len(bos) + lengths) if bos + again == ids else None


def _of_texts(paths: Sequence[str], opened: OpenModel) -> list[Document]:
    bos = [] if opened.tokenizer.bos_id is None else [opened.tokenizer.bos_id]
    documents = []
    for i, text in enumerate(read_texts(paths)):
        ids, byte_lengths = opened.tokenizer.encode_with_bytes(text)
        documents.append(Document(f"text {i + 1}", np.array(bos + ids), np.array([0] * len(bos) + byte_lengths)))
    return documents
