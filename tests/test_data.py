"""Preparing data: every kind of source, the split, and every kind of bad input."""

from __future__ import annotations

import errno
import gzip
import importlib
import json
import os
import sys
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zarr
from pyarrow import parquet

from longread.config import UserError
from longread.data import (
    PrepareProgress,
    TokenDataset,
    locate,
    prepare,
    read_pieces,
    read_texts,
    sources as sources_module,
)
from longread.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

prepare_module, documents_module = (
    importlib.import_module(f"longread.data.{name}") for name in ("prepare", "documents")
)
BYTES = ByteTokenizer()
BOS = 256


def texts_of(dataset: TokenDataset) -> list[str]:
    return [BYTES.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def names_of(dataset: TokenDataset) -> list[str]:
    return [dataset.document_name(i) for i in range(dataset.num_documents)]


def tree(directory: Path) -> dict[str, bytes]:
    """Everything below `directory`, hidden files and empty folders included."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory with text in it, and much that is none."""
    files = {
        "b.txt": b"second file\n",
        "a/deep/x.py": "naïve = '🦊'\n".encode(),
        "a/first.txt": b"first file",
        "a/binary.png": b"\x89PNG\0\0",
        "a/latin.txt": "caf\xe9".encode("latin-1"),
        "a/empty.txt": b"",
        "a/short.txt": b"x",
        ".hidden/secret.txt": b"not to be read",
        ".dot.txt": b"not to be read",
    }
    for name, content in files.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "corpus"


# --- what is read ---


def test_a_file_becomes_bos_and_its_bytes(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare([corpus / "b.txt"], tmp_path / "out", BYTES)
    assert dataset.document(0).tolist() == [BOS, *b"second file\n"]
    assert dataset.document(0).dtype == np.int64
    assert (dataset.num_documents, dataset.num_tokens, dataset.document_bytes(0)) == (1, 13, 12)
    assert (dataset.vocab_size, dataset.bos_id, dataset.documents) == (257, BOS, "reset")
    assert dataset.tokenizer_fingerprint == BYTES.fingerprint
    assert dataset.tokenizer_path is not None
    assert load_tokenizer(dataset.tokenizer_path).fingerprint == BYTES.fingerprint
    assert dataset.validation is None


def test_a_directory_is_walked_in_order_and_what_is_no_text_is_counted(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare([str(corpus)], tmp_path / "out", BYTES)
    assert texts_of(dataset) == ["second file\n", "first file", "naïve = '🦊'\n"]
    assert names_of(dataset) == [f"{corpus}/{name}" for name in ("b.txt", "a/first.txt", "a/deep/x.py")]
    assert dataset.document_bytes(2) == len("naïve = '🦊'\n".encode())
    assert dataset.index["skipped"] == {"binary": 2, "empty": 1, "too short": 1}


def test_globs_repeated_files_and_order(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare([f"{corpus}/*.txt", f"{corpus}/**/*.txt", corpus / "b.txt"], tmp_path / "out", BYTES)
    assert texts_of(dataset) == ["second file\n", "first file"]


def test_naming_a_file_makes_it_matter(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        prepare([corpus, corpus / "a" / "empty.txt"], tmp_path / "out", BYTES)


@pytest.mark.parametrize("pattern", ["deep", "a/deep", "a/deep/", "*.py", "a/*/x.py", "x.*"])
@pytest.mark.parametrize("spec", ["", "/**/*"], ids=["directory", "glob"])
def test_exclude(pattern: str, spec: str, corpus: Path, tmp_path: Path) -> None:
    dataset = prepare([f"{corpus}{spec}"], tmp_path / "out", BYTES, exclude=[pattern, "corpus"])
    assert sorted(texts_of(dataset)) == ["first file", "second file\n"]


def test_the_output_is_not_its_own_input(corpus: Path) -> None:
    prepare([corpus], corpus / "out", BYTES)
    for spec in (str(corpus), f"{corpus}/**/*"):
        assert prepare([spec], corpus / "out", BYTES, overwrite=True).num_documents == 3


def test_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed row"}\n'))
    assert texts_of(prepare([tmp_path], tmp_path / "out", BYTES)) == ["packed text", "packed row"]


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_a_byte_order_mark_is_no_text(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "BLOCK_BYTES", block)
    mark = b"\xef\xbb\xbf"
    text = b"first\n" + mark + b"second"
    (tmp_path / "a.txt").write_bytes(mark + text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark + mark + text))
    (tmp_path / "c.jsonl").write_bytes(mark + b'{"text": "a row"}\n')
    (tmp_path / "d.txt").write_bytes(mark)
    dataset = prepare([tmp_path], tmp_path / "out", BYTES)
    assert dataset.document(0).tolist() == [BOS, *text]
    assert dataset.document_bytes(0) == len(text)
    assert dataset.document(1).tolist() == [BOS, *mark, *text]
    assert texts_of(dataset)[2] == "a row"
    assert dataset.index["skipped"] == {"empty": 1}
    assert next(read_texts([tmp_path / "a.txt"])) == text.decode()


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"body": "ein Text\n"}, {"body": ""}, {"body": None}, {"body": "half \ud83e pair", "more": 1}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    dataset = prepare([tmp_path / "x.jsonl"], tmp_path / "out", BYTES, text_field="body")
    assert texts_of(dataset) == ["ein Text\n", "half � pair"]
    assert names_of(dataset) == [f"{tmp_path}/x.jsonl:0", f"{tmp_path}/x.jsonl:3"]
    assert dataset.index["skipped"] == {"empty": 2}


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", body=["one", "two", None, "three"], n=[1, 2, 3, 4])
    dataset = prepare([path], tmp_path / "out", BYTES, text_field="body")
    assert texts_of(dataset) == ["one", "two", "three"]
    assert names_of(dataset)[-1] == f"{path}:3"


class FakeHub(types.ModuleType):
    """Stands for the package `datasets`: remembers what it was asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: list[Any] = []

    def load_dataset(self, *arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((arguments, options))
        if arguments[0] == "no/such":
            raise FileNotFoundError("no such dataset\non the hub")
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub([{"text": "from far"}, {"text": "away"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("spec", "name", "configuration", "split"),
    [
        ("hf:owner/name", "owner/name", None, "train"),
        ("hf:owner/name:test", "owner/name", None, "test"),
        ("hf:name:en:test", "name", "en", "test"),
    ],
)
def test_hub(spec: str, name: str, configuration: str, split: str, hub: FakeHub, tmp_path: Path) -> None:
    dataset = prepare([spec], tmp_path / "out", BYTES)
    assert texts_of(dataset) == ["from far", "away"]
    assert names_of(dataset) == [f"{spec}:0", f"{spec}:1"]
    assert hub.asked == [((name, configuration), {"split": split, "streaming": True})]


def write_array(path: Path, tokens: Any, zarr_format: int = 3, dtype: str = "uint32") -> Path:
    tokens = np.asarray(tokens, dtype)
    zarr.create_array(str(path), data=tokens, chunks=(4,) * tokens.ndim, zarr_format=zarr_format)
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("block", [2, 5, 100])
def test_token_arrays(zarr_format: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "ARRAY_BLOCK", block)
    tokens = [7, 8, 1, 5, 6, 7, 1, 1, 9, 70_000, 3]
    path = write_array(tmp_path / "store" / "train", tokens, zarr_format)
    dataset = prepare([path], tmp_path / "out", None, bos_id=1, documents="join")
    assert dataset.tokens(0, 11).tolist() == tokens
    assert dataset.document_offsets.tolist() == [0, 2, 6, 7, 11]
    assert names_of(dataset)[2] == f"{path}:2"
    assert (dataset.vocab_size, dataset.bos_id, dataset.documents) == (70_001, 1, "join")
    assert (dataset.document_bytes(0), dataset.tokenizer_fingerprint, dataset.tokenizer_path) == (None, None, None)
    assert dataset.index["dtype"] == "uint32"


def test_token_arrays_without_bos_and_with_a_tokenizer(tmp_path: Path) -> None:
    path = write_array(tmp_path / "train", [1, 2, BOS, 4])
    assert prepare([path], tmp_path / "one", None, vocab_size=300).num_documents == 1
    dataset = prepare([path], tmp_path / "two", BYTES)
    assert (dataset.num_documents, dataset.tokenizer_fingerprint) == (2, BYTES.fingerprint)


def test_the_standard_library_of_this_python(tmp_path: Path) -> None:
    prose = Path(os.__file__).parent / "pydoc_data"
    dataset = prepare([prose, os.__file__], tmp_path / "out", BYTES)
    assert (prose / "topics.py").read_bytes().decode() in texts_of(dataset)
    assert texts_of(dataset)[-1] == Path(os.__file__).read_bytes().decode()


# --- how it is read ---


def test_a_trained_tokenizer_end_to_end(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_bpe(read_pieces([corpus], exclude=["short.txt"]), 300)
    dataset = prepare([corpus], tmp_path / "out", tokenizer)
    assert dataset.document(0).tolist() == [tokenizer.bos_id, *tokenizer.encode("second file\n")]
    assert dataset.tokenizer_path is not None
    assert load_tokenizer(dataset.tokenizer_path).fingerprint == dataset.tokenizer_fingerprint


def test_read_texts_refuses_token_ids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds token ids, not text"):
        list(read_texts([write_array(tmp_path / "train", [1, 2])]))


def test_a_binary_tail_is_found_before_anything_of_the_file_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "HELD_CHARACTERS", 10)
    monkeypatch.setattr(locate, "BLOCK_BYTES", 10)
    (corpus / "c.bin").write_bytes(b"text for a long while " * 10 + b"\0")
    dataset = prepare([corpus], tmp_path / "out", BYTES)
    assert f"{corpus}/c.bin" not in names_of(dataset)
    assert dataset.index["skipped"]["binary"] == 3


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    line = b'{"text": "' + b"word " * 200 + b'"}\n'
    peaks = []
    for number, rows in enumerate((2_000, 8_000)):
        (tmp_path / f"{number}.jsonl").write_bytes(line * rows)
        tracemalloc.start()
        prepare([tmp_path / f"{number}.jsonl"], tmp_path / f"out{number}", BYTES)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_000_000


def test_progress(corpus: Path, tmp_path: Path) -> None:
    seen: list[PrepareProgress] = []
    dataset = prepare([corpus], tmp_path / "out", BYTES, progress=seen.append)
    assert [p.documents for p in seen] == [1, 2, 3]
    assert seen[-1].tokens == dataset.num_tokens
    assert seen[-1].bytes == dataset.num_tokens - 3
    assert seen[0].source == f"{corpus}/b.txt"


def test_the_same_sources_give_the_same_files(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare([corpus], tmp_path / name, BYTES, validation_fraction=0.8)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# --- the validation split ---


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_validation_holds_out_whole_documents_by_content(tmp_path: Path) -> None:
    texts = [f"document number {i}" for i in range(400)]
    one = prepare([write_rows(tmp_path / "a.jsonl", texts)], tmp_path / "one", BYTES, validation_fraction=0.2)
    assert one.validation is not None
    held_out = set(texts_of(one.validation))
    assert 50 < len(held_out) < 110
    assert held_out | set(texts_of(one)) == set(texts)
    assert not held_out & set(texts_of(one))
    assert one.validation.tokenizer_path is not None
    shuffled = write_rows(tmp_path / "b.jsonl", texts[::-1] + texts)  # other names, another order, every one twice
    two = prepare([shuffled], tmp_path / "two", BYTES, validation_fraction=0.2)
    assert two.validation is not None
    assert set(texts_of(two.validation)) == held_out
    three = prepare([shuffled], tmp_path / "three", BYTES, validation_fraction=0.4)
    assert three.validation is not None
    assert held_out < set(texts_of(three.validation))


@pytest.mark.parametrize(("fraction", "part"), [(1e-9, "validation"), (0.999999999, "training")])
def test_an_empty_split_is_refused(fraction: float, part: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"left no document for {part}"):
        prepare([corpus], tmp_path / "out", BYTES, validation_fraction=fraction)
    assert not (tmp_path / "out").exists()


# --- bad input: one sentence, nothing left behind ---


def bad_jsonl(line: str) -> dict[str, bytes]:
    return {"x.jsonl": b'{"text": "fine"}\n' + line.encode()}


@pytest.mark.parametrize(
    ("files", "spec", "reason"),
    [
        ({}, "x.txt", "x.txt does not exist or cannot be reached"),
        ({}, "*.txt", "holds no file to read"),
        ({}, "", "holds no file to read"),
        ({"x.txt": b""}, "x.txt", "x.txt is empty"),
        ({"x.txt": b"x"}, "x.txt", "has 1 tokens of text; give at least 2"),
        ({"x.txt": b"a\0b"}, "x.txt", "is no text: its byte 1 is zero"),
        ({"x.txt": b"caf\xe9"}, "x.txt", "is not valid UTF-8 from byte 3 on"),
        ({"x.txt": b"caf\xc3"}, "x.txt", "is not valid UTF-8 from byte 3 on"),
        ({"x.txt": b"\xef\xbb"}, "x.txt", "is not valid UTF-8 from byte 0 on"),
        ({"x.txt": b"\xef\xbb\xbf"}, "x.txt", "x.txt is empty"),
        ({"x.txt.gz": b"plain"}, "x.txt.gz", "is damaged: it is not whole gzip data"),
        ({"x.txt.gz": gzip.compress(b"text" * 99)[:-9]}, "x.txt.gz", "is damaged: it is not whole gzip data"),
        ({"x.txt": b"", "y.txt": b"\0"}, "", r"no text in the sources \(1 binary, 1 empty\)"),
        ({"x.jsonl": b"\n"}, "x.jsonl", "x.jsonl has no rows"),
        (bad_jsonl("{"), "x.jsonl", r"line 2 of .*x.jsonl is not JSON"),
        (bad_jsonl("[" * 100_000), "x.jsonl", r"line 2 of .*x.jsonl is not JSON"),
        (bad_jsonl("[1]"), "x.jsonl", r"line 2 .* has no field 'text' but no fields"),
        (bad_jsonl('{"a": 1, "b": 2}'), "x.jsonl", r"line 2 .* has no field 'text' but a, b; name the one"),
        (bad_jsonl('{"text": 5}'), "x.jsonl", r"text of .*x.jsonl:1 is int; it must be a text"),
        ({"x.parquet": b"no"}, "x.parquet", "is not a valid Parquet file"),
        ({"x/train/.zarray": b"{}"}, "x", "is a token array inside a directory of files"),
        ({"x/.zgroup": b"{}"}, "x", "is a group of token arrays; name one of them"),
        ({"x/zarr.json": b'{"node_type": "group"}'}, "x", "is a group of token arrays; name one of them"),
        ({"x/.zarray": b"{}"}, "x", "cannot read the token array"),
    ],
)
def test_bad_sources(files: dict[str, bytes], spec: str, reason: str, tmp_path: Path) -> None:
    base = tmp_path / "in"
    base.mkdir()
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        prepare([f"{base}/{spec}"], tmp_path / "new" / "out", BYTES)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", a=["one"], b=["two"])
    with pytest.raises(UserError, match="has no column 'text' but a, b; name the one that holds text"):
        prepare([path], tmp_path / "out", BYTES)
    with pytest.raises(UserError, match="it must be a text"):
        prepare([write_parquet(path, text=[3])], tmp_path / "out", BYTES)
    latin = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xe9\xe9"))
    with pytest.raises(UserError, match="is not a valid Parquet file"):
        prepare([write_parquet(path, text=latin)], tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("hf:no/such", "cannot read hf:no/such: no such dataset on the hub"),
        ("hf:a:b:c:d", "is not a dataset name"),
        ("hf:", "is not a dataset name"),
    ],
)
def test_bad_hub_names(spec: str, reason: str, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        prepare([spec], tmp_path / "out", BYTES)


def test_a_hub_dataset_without_the_field(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf:x has no field 'body' but text; name the one"):
        prepare(["hf:x"], tmp_path / "out", BYTES, text_field="body")


@pytest.mark.parametrize(
    ("module", "spec", "extra"),
    [("pyarrow", "x.parquet", "parquet"), ("datasets", "hf:x", "hub"), ("zarr", "array", "zarr")],
)
def test_a_missing_package_says_what_installs_it(
    module: str, spec: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "x.parquet", text=["one"])
    write_array(tmp_path / "array", [1, 2])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"run pip install {module}$"):
        prepare([spec if extra == "hub" else tmp_path / spec], tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    ("tokens", "dtype", "options", "reason"),
    [
        ([1, 2, 300], "uint32", {"vocab_size": 300}, "token id 300 of .* is outside the vocabulary of 300"),
        ([1, -2, 3], "int32", {}, "token id -2 of .* is outside the vocabulary of 4"),
        ([1, 2], "uint32", {"bos_id": 3}, "bos_id 3 is outside the vocabulary of 3"),
        ([1, 2], "uint32", {"vocab_size": 0}, "vocab_size is 0; it must lie between"),
        ([1.0, 2.0], "float32", {}, "has 1 dimensions of float32; a token array has one"),
        ([[1, 2], [3, 4]], "uint16", {}, "has 2 dimensions of uint16; a token array has one"),
        ([1], "uint16", {}, "has 1 tokens; give at least 2"),
    ],
)
def test_bad_token_arrays(tokens: Any, dtype: str, options: dict[str, int], reason: str, tmp_path: Path) -> None:
    path = write_array(tmp_path / "train", tokens, dtype=dtype)
    with pytest.raises(UserError, match=reason):
        prepare([path], tmp_path / "out", None, **options)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["train"]


def test_a_bos_beside_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(UserError, match="bos_id is 1, but the tokenizer has its own; it is for token arrays alone"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", ByteTokenizer(), bos_id=1)
    assert not (tmp_path / "out").exists()


def test_a_damaged_token_array(tmp_path: Path) -> None:
    path = write_array(tmp_path / "train", range(100))
    for chunk in (path / "c").iterdir():
        chunk.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot read the token array .* at token 0"):
        prepare([path], tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"documents": "none"}, "documents is 'none'; it must be reset or join"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; it must lie in"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan; it must lie in"),
        ({"shard_tokens": 0}, "shard_tokens is 0; it must be at least 1"),
        ({"sources": []}, "there is nothing to read"),
        ({"tokenizer": None}, "is text and needs a tokenizer"),
    ],
)
def test_bad_options(options: dict[str, Any], reason: str, corpus: Path, tmp_path: Path) -> None:
    arguments = {"sources": [corpus], "tokenizer": BYTES, **options}
    with pytest.raises(UserError, match=reason):
        prepare(out=tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == ["corpus"]


def test_unreadable_files(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: str, buffering: int) -> Any:
        if path.endswith("first.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open(path, mode, buffering)

    monkeypatch.setattr(locate, "open", refuse, raising=False)
    dataset = prepare([corpus], tmp_path / "out", BYTES)
    assert dataset.index["skipped"]["unreadable"] == 1
    with pytest.raises(UserError, match=r"first.txt is unreadable: Permission denied"):
        prepare([corpus / "a" / "first.txt"], tmp_path / "other", BYTES)
