"""Bytes to text: encodings, line ends, packed files, and files that are no text, however the bytes arrive."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from longread.config import UserError
from longread.data import NotText, TextFile, TextFormat, TokenDataset, Unreadable, decode_text, open_texts, prepare
from longread.data.text import unpacked
from longread.tokenizer import ByteTokenizer

TEXT = "Die Möwe ruft – 日本語 🦊.\nAnd on."


def blocks(data: bytes, draw: Random) -> Iterator[bytes]:
    """The data, cut anywhere."""
    begin = 0
    while begin < len(data):
        end = begin + draw.choice([1, 1, 2, 3, 7, 100])
        yield data[begin:end]
        begin = end


def refused(pieces: Iterable[Any]) -> tuple[list[Any], NotText | Unreadable]:
    """What was given before the refusal, and the refusal."""
    got, rest = [], iter(pieces)
    while True:
        try:
            got.append(next(rest))
        except (NotText, Unreadable) as error:
            return got, error


@given(st.lists(st.sampled_from(["\r\n", "\r", "\n", "a", "é", "🦊"]), max_size=60), st.randoms(use_true_random=False))
def test_line_ends_become_line_feeds_wherever_the_bytes_are_cut(parts: list[str], draw: Random) -> None:
    text = "".join(parts)
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(decode_text(blocks(text.encode(), draw))) == expected == TextFormat().normalized(text)
    kept = TextFormat(keep_line_ends=True)
    assert "".join(decode_text(blocks(text.encode(), draw), kept)) == text == kept.normalized(text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_a_byte_order_mark_says_the_encoding(encoding: str) -> None:
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    for seed in range(20):
        assert "".join(decode_text(blocks((mark + TEXT).encode(encoding), Random(seed)))) == TEXT


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "shift_jis", "gb18030", "utf-8", "koi8-r"])
def test_an_encoding_by_name(encoding: str) -> None:
    text = {"shift_jis": "日本語の海", "gb18030": "海鸥", "koi8-r": "Чайка"}.get(encoding, "Möwe")
    for seed in range(10):
        data = (text * 9).encode(encoding)
        assert "".join(decode_text(blocks(data, Random(seed)), TextFormat(encoding))) == text * 9


@pytest.mark.parametrize("encoding", ["no-such", "base64", "rot13", "a\0b", ""])
def test_encodings_that_are_none(encoding: str) -> None:
    with pytest.raises(UserError, match="there is no encoding"):
        TextFormat(encoding)


@given(st.text("aé🦊\n", max_size=300), st.sampled_from([b"\xff", b"\xc3(", b"\xf0\x9f", b"\0"]), st.randoms())
def test_a_bad_byte_is_named_and_all_before_it_was_given(text: str, bad: bytes, draw: Random) -> None:
    data = text.encode() + bad
    got, error = refused(decode_text(blocks(data + (b" more" if bad != b"\xf0\x9f" else b""), draw)))
    assert "".join(got) == text
    assert error.byte == len(text.encode())


@pytest.mark.parametrize("encoding", ["utf-16-le", "shift_jis", "ascii"])
def test_a_bad_byte_of_other_encodings(encoding: str) -> None:
    bad = {"utf-16-le": b"\x00\xdc", "shift_jis": b"\xff", "ascii": b"\x80"}[encoding]
    data = ("gull " * 30).encode(encoding)
    for seed in range(10):
        got, error = refused(decode_text(blocks(data + bad + b"aa", Random(seed)), TextFormat(encoding)))
        assert "".join(got) == "gull " * 30
        assert error.byte == len(data)
        assert f"from byte {len(data)} on" in str(error)


def test_replacing_takes_everything() -> None:
    data = b"caf\xe9 au\0lait \xf0\x9f"
    for seed in range(10):
        got = "".join(decode_text(blocks(data, Random(seed)), TextFormat(errors="replace")))
        assert got == "caf\ufffd au\ufffdlait \ufffd"


def test_errors_are_strict_or_replaced() -> None:
    with pytest.raises(UserError, match="errors is 'ignore'; it must be strict or replace"):
        TextFormat(errors="ignore")  # type: ignore[arg-type]


def zipped(name: str, content: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%PDF-1.7\nplain enough", "is a PDF file; take the text out first, for example with pdftotext"),
        (zipped("notes.txt", "a"), "is a ZIP archive"),
        (zipped("word/document.xml", "a"), "is a Word document"),
        (zipped("mimetype", "application/epub+zip"), "is an EPUB book"),
        (bz2.compress(b"text"), "is compressed by bzip2"),
        (lzma.compress(b"text"), "is compressed by xz"),
        (b"\x89PNG\r\n\x1a\n....", "is a PNG picture"),
        (b"\xff\xd8\xff\xe0....", "is a JPEG picture"),
        (b"PAR1....PAR1", "is a Parquet file"),
        (b"SQLite format 3\0...", "is an SQLite database"),
        (b"<!DOCTYPE html>\n<p>text", "is an HTML page, and would be read with its tags"),
        (b"\xef\xbb\xbf\n <!-- saved -->\n<HTML lang='en'>", "is an HTML page"),
        (b"<?xml version='1.0'?>\n<html xmlns='x'>", "is an HTML page"),
        (b"{\\rtf1\\ansi text}", "is an RTF document"),
    ],
)
def test_files_of_other_kinds_are_named(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"file.txt {words}"):
        list(TextFile(str(tmp_path / "file.txt")))


@pytest.mark.parametrize("data", [b"<p>no page", b"html", b"PK is short", b"BZ", b"<htmlx>", b"%PD"])
def test_texts_that_begin_alike_are_texts(data: bytes) -> None:
    assert "".join(decode_text([data])) == data.decode()


def test_markup_is_read_where_it_is_wanted() -> None:
    page = b"<!doctype html><p>text"
    assert "".join(decode_text([page], TextFormat(markup=True))) == page.decode()


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_gzip_is_unpacked_wherever_it_comes_from(parts: list[bytes], draw: Random) -> None:
    packed = b"".join(map(gzip.compress, parts)) + b"\0" * draw.randrange(3)
    assert b"".join(unpacked(blocks(packed, draw))) == b"".join(parts)


def test_much_that_was_packed_small_comes_in_pieces() -> None:
    pieces = list(unpacked([gzip.compress(bytes(5_000_000))]))
    assert (sum(map(len, pieces)), max(map(len, pieces)) <= 1 << 20) == (5_000_000, True)


@pytest.mark.parametrize("damage", ["cut", "changed", "followed"])
def test_damaged_gzip_gives_what_it_has(damage: str) -> None:
    text = "".join(f"line {i}\n" for i in range(40_000)).encode()
    packed = gzip.compress(text)
    data = {"cut": packed[:-9], "changed": packed[:-6] + b"\0\0" + packed[-4:], "followed": packed + b"more"}[damage]
    got, error = refused(unpacked(data[i : i + 1000] for i in range(0, len(data), 1000)))
    assert "is damaged: it is not whole gzip data" in str(error)
    assert text.startswith(b"".join(got))
    assert sum(map(len, got)) > len(text) / 2


def test_a_bad_byte_late_in_a_file(tmp_path: Path) -> None:
    text = "gulls " * 100_000
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xe9")
    got, error = refused(TextFile(str(tmp_path / "a.txt")))
    assert "a.txt is not valid UTF-8 from byte 600,000 on; name its encoding" in str(error)
    assert isinstance(error, UserError)
    assert "".join(got) == text


def test_addresses_are_not_files() -> None:
    for name in ("https://example.org/book.txt", "HTTP://a.b/c"):
        with pytest.raises(UserError, match="is an address, not a file; download it first"):
            open_texts([name])


def test_files_directories_and_stdin_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.txt", "b/1.txt", "b/.hidden", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(b"piped"))))
    files = open_texts([str(tmp_path / "b"), "-", str(tmp_path / "a.txt")])
    assert ["".join(file) for file in files] == ["text of b/1.txt", "text of b/2.txt", "piped", "text of a.txt"]
    assert [file.named for file in files] == [False, False, True, True]
    assert [file.size for file in files] == [15, 15, None, 13]
    assert files[-1].num_bytes_read == 13
    with pytest.raises(UserError, match="- is given twice"):
        open_texts(["-", "-"])
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        list(files[2])


def test_what_was_done_to_a_text_is_recorded_with_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("eins\r\nzwei\rdrei é".encode("latin-1"))
    expected = {False: b"eins\nzwei\ndrei \xc3\xa9", True: b"eins\r\nzwei\rdrei \xc3\xa9"}
    for keep, text in expected.items():
        text_format = TextFormat("latin-1", keep_line_ends=keep)
        data = prepare([tmp_path / "a.txt"], tmp_path / f"out{keep}", ByteTokenizer(), text_format=text_format)
        assert data.document(0).tolist() == [256, *text]
        recorded = TokenDataset.open(data.directory).index["text"]
        assert recorded == {"encoding": "latin-1", "errors": "strict", "line_ends": "kept" if keep else "lf"}


def test_rows_have_the_same_line_ends_as_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one\\r\\ntwo\\rthree"}\r\n'.decode().encode("utf-16"))
    data = prepare([tmp_path / "a.jsonl"], tmp_path / "out", ByteTokenizer())
    assert data.document(0).tolist() == [256, *b"one\ntwo\nthree"]
    assert data.index["text"] == {"encoding": "utf-8", "errors": "strict", "line_ends": "lf"}
