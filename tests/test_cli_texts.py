"""Texts as the commands read them: one text is one document, and its tokens never depend on how it came."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from longread.cli.documents import read_documents
from longread.cli.texts import BLOCK, read_tokens
from longread.data import TextFormat
from longread.tokenizer import ByteTokenizer, Tokenizer, train_bpe

BYTES = ByteTokenizer()
LINES = "".join(f"{'    ' * (1 + i % 4)}depth = {i}\r\n" for i in range(9000))
BPE = train_bpe([LINES], 300)


def tokens_of(name: str, tokenizer: Tokenizer, text_format: TextFormat | None = None) -> tuple[list[int], int]:
    """All ids, and the bytes that they cover."""
    pieces = list(read_tokens(name, tokenizer, text_format))
    return [i for ids, _ in pieces for i in ids], sum(sum(lengths) for _, lengths in pieces)


def test_a_text_without_spaces_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("é" * 3 * BLOCK + " and a word")
    pieces = list(read_tokens(str(path), BYTES))
    assert len(pieces) > 3
    assert max(len(ids) for ids, _ in pieces) <= 2 * BLOCK
    assert BYTES.decode([i for ids, _ in pieces for i in ids]) == path.read_text()


def test_a_byte_order_mark_is_no_text_and_lines_end_in_line_feeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n \xef\xbb\xbftwo")
    expected = list(b"one\n \xef\xbb\xbftwo")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    for name in (str(path), "-"):
        assert tokens_of(name, BYTES) == (expected, len(expected))
    kept = TextFormat(keep_line_ends=True)
    assert tokens_of(str(path), BYTES, kept)[0] == list(b"one\r\n \xef\xbb\xbftwo")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_do_not_depend_on_the_file(encoding: str, packed: bool, tmp_path: Path) -> None:
    data = LINES.encode(encoding)
    name = "text.txt.gz" if packed else "text.txt"
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    text = LINES.replace("\r\n", "\n")
    assert tokens_of(str(tmp_path / name), BPE) == (BPE.encode(text), len(text))


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
def test_a_long_text_is_one_document(name: str, tmp_path: Path) -> None:
    text = "a grey gull over the pier " * 50_000
    (tmp_path / name).write_text(text if name.endswith("txt") else f'{{"text": "{text}"}}')
    (document,) = read_documents([str(tmp_path / name)], {"model": BPE})[BPE.fingerprint]
    assert document.tokens.tolist() == [BPE.bos_id, *BPE.encode(text)]
    assert document.byte_lengths is not None
    assert document.byte_lengths.sum() == len(text)
