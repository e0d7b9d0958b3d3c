"""The token format: what is written is read back, and a damaged dataset is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longread.config import UserError
from longread.data import TokenDataset, prepare
from longread.data.shards import ShardWriter
from longread.tokenizer import ByteTokenizer

Index = dict[str, Any]
TEXTS = ["the first text", "second", "and the third of them"]
STREAM = [i for text in TEXTS for i in (256, *text.encode())]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three documents in shards of ten tokens."""
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    prepare([tmp_path / "x.jsonl"], tmp_path / "out", ByteTokenizer(), shard_tokens=10)
    return tmp_path / "out"


def test_documents_may_span_shards(directory: Path) -> None:
    dataset = TokenDataset.open(directory)
    assert len(list(directory.glob("tokens-*.bin"))) == len(dataset.index["shards"]) == 5
    for i, text in enumerate(TEXTS):
        assert dataset.document(i).tolist() == [256, *text.encode()]
        assert dataset.document_bytes(i) == len(text)
    for start in range(0, len(STREAM) + 1, 3):
        for stop in range(start, len(STREAM) + 1, 4):
            assert dataset.tokens(start, stop).tolist() == STREAM[start:stop]


def test_the_files_on_disk(directory: Path) -> None:
    index = json.loads((directory / "index.json").read_text())
    assert (index["format"], index["format_version"], index["dtype"]) == ("longread-tokens", 1, "uint16")
    files = b"".join((directory / shard["file"]).read_bytes() for shard in index["shards"])
    assert np.frombuffer(files, "<u2").tolist() == STREAM
    assert [shard["tokens"] for shard in index["shards"]] == [10, 10, 10, 10, 4]
    assert index["document_table"]["offset"] == [0, 15, 22]


@pytest.mark.parametrize(("vocab_size", "size"), [(2, 2), (65_536, 2), (65_537, 4), (128_256, 4), (2**32, 4)])
def test_the_smallest_dtype_that_holds_the_vocabulary(vocab_size: int, size: int, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size, 100)
    writer.begin_document("x", None)
    writer.add(np.array([0, vocab_size - 1]), 3)
    writer.finish({"bos_id": None, "tokenizer": None, "documents": "join", "skipped": {}})
    assert (tmp_path / "tokens-00000.bin").stat().st_size == 2 * size
    dataset = TokenDataset.open(tmp_path)
    assert dataset.document(0).tolist() == [0, vocab_size - 1]
    with pytest.raises(UserError, match=f"token id {vocab_size} of x is outside the vocabulary of {vocab_size}"):
        writer.add(np.array([0, vocab_size]), 1)


@pytest.mark.parametrize("i", [-1, 3])
def test_there_are_no_other_documents(i: int, directory: Path) -> None:
    dataset = TokenDataset.open(directory)
    for access in (dataset.document, dataset.document_bytes, dataset.document_name):
        with pytest.raises(IndexError, match=f"document {i} of 3"):
            access(i)
    with pytest.raises(IndexError, match="of 44"):
        dataset.tokens(0, 45)


def test_a_flipped_bit_is_found_by_verify(directory: Path) -> None:
    TokenDataset.open(directory).verify()
    path = directory / "tokens-00003.bin"
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens-00003.bin has changed on disk; prepare the data again"):
        TokenDataset.open(directory).verify()


def test_a_truncated_shard(directory: Path) -> None:
    path = directory / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-00001.bin has 19 bytes instead of 20; prepare the data again"):
        TokenDataset.open(directory)


def test_a_missing_shard(directory: Path) -> None:
    (directory / "tokens-00001.bin").unlink()
    with pytest.raises(UserError, match=r"tokens-00001.bin is missing"):
        TokenDataset.open(directory)


def edited(**fields: Any) -> Callable[[Index], Any]:
    return lambda index: {**index, **fields}


def table(**columns: Any) -> Callable[[Index], Any]:
    return lambda index: {**index, "document_table": {**index["document_table"], **columns}}


def without(field: str) -> Callable[[Index], Any]:
    return lambda index: {name: value for name, value in index.items() if name != field}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (edited(format="other"), "is not an index of Longread tokens"),
        (lambda index: [index], "is not an index of Longread tokens"),
        (edited(format_version=2), "has format version 2; this Longread reads 1"),
        (edited(dtype="uint32"), "damaged .*dtype"),
        (edited(dtype="float16"), "damaged .*dtype"),
        (edited(vocab_size=0), "damaged .*vocab_size"),
        (edited(vocab_size="many"), "damaged"),
        (edited(bos_id=257), "damaged .*bos_id"),
        (edited(documents="other"), "damaged .*documents"),
        (edited(num_tokens=43), "damaged .*num_tokens"),
        (edited(shards=[]), "damaged .*num_tokens"),
        (edited(shards=[{"file": "../x", "tokens": 44, "sha256": ""}]), "damaged .*shards"),
        (edited(shards=7), "damaged"),
        (table(offset=[0, 15]), "damaged .*document_table"),
        (table(offset=[1, 15, 22]), "damaged .*offset"),
        (table(offset=[0, 15, 15]), "damaged .*offset"),
        (table(offset=[0, 15, 44]), "damaged .*offset"),
        (table(offset=[0, 15, "x"]), "damaged"),
        (table(source=[0, 0, 1]), "damaged .*source"),
        (edited(document_table={name: [] for name in ("offset", "bytes", "source", "row")}), "damaged"),
        *[(without(name), "damaged") for name in ("dtype", "vocab_size", "bos_id", "tokenizer", "documents")],
        *[(without(name), "damaged") for name in ("num_tokens", "shards", "sources", "document_table")],
    ],
)
def test_a_damaged_index(edit: Callable[[Index], Any], reason: str, directory: Path) -> None:
    path = directory / "index.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=reason):
        TokenDataset.open(directory)


def test_an_index_that_is_cut_off(directory: Path) -> None:
    path = directory / "index.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match="is damaged: it is not JSON"):
        TokenDataset.open(directory)


def test_what_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="holds no prepared tokens; make them with: longread prepare"):
            TokenDataset.open(path)
