"""Texts as the commands read them: one text is one document, and its tokens never depend on how it came."""

from __future__ import annotations

import functools
import gzip
import io
from pathlib import Path

import pytest

from longread.cli import main
from longread.cli.documents import read_for_all
from longread.cli.reading.pieces import Inputs, Pieces, TokenPiece
from longread.data import TextFormat, TokenDataset
from longread.data.locate import BLOCK_BYTES
from longread.recipes import toy
from longread.tokenizer import ByteTokenizer, Tokenizer, train_bpe

BYTES = ByteTokenizer()
CONFIG = toy().model
LINES = "".join(f"{'    ' * (1 + i % 4)}depth = {i}\r\n" for i in range(9000))
BPE = train_bpe([LINES], 300)


def pieces_of(name: str, tokenizer: Tokenizer, text_format: TextFormat | None = None) -> list[TokenPiece]:
    """As `longread read` reads them, by a session that goes on."""
    return list(Pieces(Inputs([name], text_format), tokenizer, CONFIG, "cpu", position=1))


def tokens_of(name: str, tokenizer: Tokenizer, text_format: TextFormat | None = None) -> tuple[list[int], int]:
    """All ids, and the bytes that they cover."""
    pieces = pieces_of(name, tokenizer, text_format)
    return [i for piece in pieces for i in piece.ids], sum(sum(piece.byte_lengths) for piece in pieces)


def test_a_text_without_spaces_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("é" * 3 * BLOCK_BYTES + " and a word")
    pieces = pieces_of(str(path), BYTES)
    assert len(pieces) > 3
    assert max(len(piece.ids) for piece in pieces) <= 2 * BLOCK_BYTES
    assert BYTES.decode([i for piece in pieces for i in piece.ids]) == path.read_text()


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


LONG = "a grey gull over the pier " * 41_000


@functools.cache
def encoded_long() -> list[int]:
    return BPE.encode(LONG)


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
def test_a_long_text_is_one_document(name: str, tmp_path: Path) -> None:
    text, ids = LONG, encoded_long()
    (tmp_path / name).write_text(text if name.endswith("txt") else f'{{"text": "{text}"}}')
    (document,) = read_for_all([str(tmp_path / name)], {"model": BPE})[BPE.fingerprint]
    assert document.tokens.tolist() == [BPE.bos_id, *ids]
    assert document.byte_lengths is not None
    assert document.byte_lengths.sum() == len(text)


def test_a_data_set_with_its_own_tokenizer_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the tide goes out\r\n" * 50)
    arguments = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--train-tokenizer", "270"]
    assert main(arguments) == 0
    assert main([*arguments, "--overwrite", "--keep-line-ends"]) == 0
    assert TokenDataset.open(tmp_path / "out").index["text"]["line_ends"] == "kept"


def test_bytes_become_text_as_the_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes("Möwe über\r\nMeer".encode("latin-1"))
    arguments = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "a.txt is not valid UTF-8 from byte 1 on; name its encoding" in capsys.readouterr().err
    assert main([*arguments, "--encoding", "no"]) == 2
    assert "there is no encoding 'no'" in capsys.readouterr().err
    assert main([*arguments, "--encoding", "latin-1"]) == 0
    assert BYTES.decode(TokenDataset.open(tmp_path / "out").document(0)) == "Möwe über\nMeer"
