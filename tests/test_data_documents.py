"""Documents that are longer than what is encoded at a time: one document, with the tokens of the whole."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from random import Random

import pytest

from longread.data import locate, prepare, read_pieces, read_texts
from longread.tokenizer import train_bpe
from tests.tokenizer_kinds import hard_text, tokenizer_of

prepare_module, documents_module = (
    importlib.import_module(f"longread.data.{name}") for name in ("prepare", "documents")
)


def test_long_documents_are_read_in_pieces_that_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The quick brown fox, naïve as 🦊🦊 are, jumps. " * 50 + "x" * 300
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    tokenizer = train_bpe([text], 300)
    whole = prepare([tmp_path / "a.txt"], tmp_path / "whole", tokenizer).document(0)
    monkeypatch.setattr(locate, "BLOCK_BYTES", 7)
    monkeypatch.setattr(prepare_module, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 100)
    for spec in ("a.txt", "b.jsonl", "*.txt"):
        dataset = prepare([str(tmp_path / spec)], tmp_path / "out", tokenizer, overwrite=True)
        assert dataset.document(0).tolist() == whole.tolist()
        assert dataset.document_bytes(0) == len(text.encode())
        assert dataset.num_documents == 1
    assert list(read_texts([tmp_path / "a.txt"])) == [text]
    assert list(read_texts([tmp_path / "a.txt"], longest=10)) == [text[:10]]
    pieces = list(read_pieces([tmp_path / "a.txt"]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 110


@pytest.mark.parametrize("kind", ["bytes", "llama 3", "llama 2", "qwen", "bert", "unigram without words"])
def test_a_document_of_any_kind_has_the_tokens_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 2000)
    tokenizer = tokenizer_of(kind)
    texts = [hard_text(Random(seed), length).replace("\0", "") for seed, length in enumerate((100, 9000, 800, 5000))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    for i, text in enumerate(texts):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        assert data.document(i).tolist() == [*tokenizer.beginning, *tokenizer.encode(text)]
        assert data.document_bytes(i) == len(text.encode())


def test_the_split_does_not_depend_on_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PIECE_CHARACTERS", 300)
    texts = [f"{i} " + hard_text(Random(i), 1500) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chosen = []
    for kind in ("bytes", "llama 3", "llama 2"):
        data = prepare([tmp_path / "a.jsonl"], tmp_path / kind, tokenizer_of(kind), validation_fraction=0.4)
        assert data.validation is not None
        chosen.append([data.validation.document_name(i) for i in range(data.validation.num_documents)])
    assert chosen[0] == chosen[1] == chosen[2]
