"""Documents to evaluate on, in the tokens of one model or of several: those of a data set, or of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longread.config import UserError
from longread.data import TextFormat, TokenDataset, finish_replacement, read_texts
from longread.evaluate import Document, in_common
from longread.loading import OpenModel
from longread.tokenizer import Tokenizer


def read_documents(paths: Sequence[str], opened: OpenModel, **choice: Any) -> list[Document]:
    """The documents that `read_for_all` gives one model; `choice` as there."""
    return read_for_all(paths, {opened.name: opened.tokenizer}, **choice)[opened.tokenizer.fingerprint]


def read_for_all(
    paths: Sequence[str],
    tokenizers: Mapping[str, Tokenizer],
    *,
    first: int | None = None,
    min_tokens: int = 2,
    max_tokens: int | None = None,
    asked_by: str = "--min-tokens",
    text_format: TextFormat | None = None,
) -> dict[str, list[Document]]:
    """The `first` documents of at least `min_tokens`, cut to `max_tokens`; `asked_by` set the minimum.

    Args:
        tokenizers: by the name of the model that reads with it.
        text_format: of texts; a data set says its own.

    Returns:
        The documents by fingerprint of tokenizer. Several hold the same texts, each with the bytes common to them.

    Raises:
        UserError: there is none, or they are tokens of another tokenizer.
    """
    several = len({tokenizer.fingerprint for tokenizer in tokenizers.values()}) > 1
    readings: dict[str, list[Document]] = {}
    for name, tokenizer in tokenizers.items():
        if tokenizer.fingerprint not in readings:
            found = _of_dataset(paths[0], name, tokenizer, several) if len(paths) == 1 else None
            readings[tokenizer.fingerprint] = _of_texts(paths, tokenizer, text_format) if found is None else found
    kept = [
        i
        for i, same in enumerate(zip(*readings.values(), strict=True))
        if min(len(document.tokens) for document in same) >= min_tokens
    ][:first]
    if not kept:
        raise UserError(f"no document has {min_tokens} tokens; lower {asked_by} or give longer texts")
    cut = [[_beginning(documents[i], max_tokens) for i in kept] for documents in readings.values()]
    return dict(zip(readings, in_common(cut) if several else cut, strict=True))


def longest_of(readings: Mapping[str, list[Document]]) -> tuple[int, str]:
    """The length of the longest document that `read_for_all` gave, and what it is counted in."""
    documents = [document for reading in readings.values() for document in reading]
    common = [document.common_bytes[1] for document in documents if document.common_bytes]
    return (max(common), "bytes") if common else (max(len(document.tokens) for document in documents), "tokens")


def _beginning(document: Document, max_tokens: int | None) -> Document:
    name, tokens, lengths, _ = document
    return Document(name, tokens[:max_tokens], None if lengths is None else lengths[:max_tokens])


def _of_dataset(path: str, name: str, tokenizer: Tokenizer, several: bool) -> list[Document] | None:
    """The documents of a data set; None if there is none at `path`."""
    finish_replacement(Path(path))
    if not (Path(path) / "index.json").is_file():
        return None
    dataset = TokenDataset.open(path)
    if dataset.tokenizer_fingerprint is None and several:
        raise UserError(
            f"{path} holds tokens and does not say of which tokenizer, and the models have different ones; "
            "give the texts themselves"
        )
    made_with = dataset.tokenizer_fingerprint
    if made_with is not None and not tokenizer.has_fingerprint(made_with):
        raise UserError(f"{path} was prepared with another tokenizer than {name}; give the texts themselves")
    documents = []
    for i in range(dataset.num_documents):
        tokens = dataset.document(i)
        documents.append(Document(dataset.document_name(i), tokens, bytes_of_tokens(tokens, tokenizer)))
    return documents


def bytes_of_tokens(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token covers of the text that they decode to; None where that gives other tokens.

    A tokenizer that normalises may have been given another text.
    """
    ids = tokens.tolist()
    bos = ids[:1] if ids[:1] == [tokenizer.bos_id] else []
    again, lengths = tokenizer.encode_with_bytes(tokenizer.decode(ids[len(bos) :]))
    return np.array([0] * len(bos) + lengths) if bos + again == ids else None


def _of_texts(paths: Sequence[str], tokenizer: Tokenizer, text_format: TextFormat | None) -> list[Document]:
    bos = tokenizer.beginning
    documents = []
    for i, text in enumerate(read_texts(paths, text_format=text_format)):
        ids, byte_lengths = tokenizer.encode_with_bytes(text)
        documents.append(Document(f"text {i + 1}", np.array(bos + ids), np.array([0] * len(bos) + byte_lengths)))
    return documents
