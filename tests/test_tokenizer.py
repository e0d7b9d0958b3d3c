"""Tokenizers: lossless, exact in bytes, deterministic, and deaf to special tokens spelled out in a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from longread.config import UserError
from longread.tokenizer import BOS, ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer, train_bpe
from longread.tokenizer.bpe import LONGEST_WORD, _without_long_words

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "Der flinke braune Fuchs, naïve Käfer: 日本語 🦊.\r\n" * 20,
]
BPE = train_bpe(CORPUS, 320)
BYTES = ByteTokenizer()
unicode_texts = st.text(st.characters(exclude_categories=["Cs"]))
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@both
@given(text=unicode_texts)
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@both
@given(text=unicode_texts)
def test_bytes_per_token_sum_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids, counts = tokenizer.encode_with_bytes(text)
    assert ids == tokenizer.encode(text)
    assert len(counts) == len(ids)
    assert sum(counts) == len(text.encode())


def test_bytes_per_token_are_exact_when_tokens_split_a_character() -> None:
    tokenizer = train_bpe(["plain words only"], 300)  # has seen no such character, so each byte is a token
    ids, counts = tokenizer.encode_with_bytes("🦊 plain")
    assert len(ids) > 4
    assert counts[:4] == [1, 1, 1, 1]
    assert BYTES.encode_with_bytes("é") == ([0xC3, 0xA9], [1, 1])


def byte_fallback() -> HuggingFaceTokenizer:
    """As SentencePiece models are converted: characters outside the vocabulary become a token per byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}, "▁": 258, "a": 259, "é": 260}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>"])
    return HuggingFaceTokenizer(tokenizer)


def test_byte_fallback_counts_one_byte_a_token() -> None:
    tokenizer = byte_fallback()
    ids, counts = tokenizer.encode_with_bytes("é 🦊🦊a")
    assert tokenizer.decode(ids) == "é 🦊🦊a"
    assert counts == [2, 1, *[1] * 8, 1]


def test_bytes_sum_when_a_normaliser_drops_characters() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "e": 1, "?": 2}, unk_token="?"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = HuggingFaceTokenizer(tokenizer)
    assert wrapped.bos_id is None
    assert wrapped.encode_with_bytes("  é  a \n") == ([1, 0], [4, 5])


def test_a_special_token_in_a_text_is_only_text() -> None:
    text = f"before {BOS} after"
    assert BPE.bos_id == BPE._tokenizer.token_to_id(BOS)
    assert BPE.bos_id not in BPE.encode(text)
    assert BPE.decode([BPE.bos_id, *BPE.encode(text)]) == text


@both
def test_decoding_part_of_a_character_gives_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🂡")
    assert tokenizer.decode(ids[:1]) == "�"
    assert tokenizer.decode([]) == ""


@both
@pytest.mark.parametrize("bad", [-1, 100_000])
def test_unknown_ids_are_refused(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(UserError, match=f"token id {bad} is not in this tokenizer"):
        tokenizer.decode([0, bad])


@both
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 2"):
        tokenizer.encode("ab\ud83e")


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(unicode_texts.filter(bool), min_size=1, max_size=4), size=st.integers(258, 300))
def test_training_is_deterministic_and_keeps_every_byte(texts: list[str], size: int) -> None:
    first, second = train_bpe(iter(texts), size), train_bpe(iter(texts), size)
    assert first.fingerprint == second.fingerprint
    assert 257 <= first.vocab_size <= size
    assert first.decode(first.encode(alphabet := "".join(map(chr, range(0x250))))) == alphabet


def test_training_learns_merges() -> None:
    assert BPE.vocab_size == 320
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2


@pytest.mark.parametrize("letter", ["a", "é", "7", "-", " ", "\n", "x1", "ab"])
def test_words_of_any_length_are_learned_from_in_parts(letter: str) -> None:
    """A word that is too long is cut, and nothing else is: the merges are those of its parts among other words."""
    text = "some words " + letter * 2000 + " and others"
    words = [text[a:b] for _, (a, b) in tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)]
    parts = [word[i : i + LONGEST_WORD] for word in words for i in range(0, len(word), LONGEST_WORD)]
    assert [*_without_long_words(text, tokenizers.pre_tokenizers.ByteLevel(False))] != [text] or max(
        map(len, words)
    ) <= LONGEST_WORD
    learned = train_bpe([text], 300)
    assert learned.fingerprint == train_bpe(parts, 300).fingerprint
    assert learned.decode(learned.encode(text)) == text


def test_ordinary_text_is_not_cut() -> None:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(False)
    for text in (CORPUS[1], "a" * LONGEST_WORD, "https://example.org/" + "path/to/" * 100, " " * 256 + "x"):
        pieces = list(_without_long_words(text, byte_level))
        assert "".join(pieces) == text
        assert len(pieces) == 1


@pytest.mark.parametrize("size", [257, 0, -1])
def test_training_needs_room_for_bytes(size: int) -> None:
    with pytest.raises(UserError, match=f"vocab_size is {size}; a byte-level BPE needs at least 258"):
        train_bpe(CORPUS, size)


@pytest.mark.parametrize("texts", [[], [""]])
def test_training_needs_text(texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text to train"):
        train_bpe(texts, 300)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, byte_fallback()], ids=["bytes", "bpe", "byte fallback"])
def test_saving_and_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    for spec in (tmp_path / "new", str(tmp_path / "new" / "tokenizer.json")):
        loaded = load_tokenizer(spec)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
        assert loaded.encode("é the lazy 🦊") == tokenizer.encode("é the lazy 🦊")


def test_fingerprints_tell_tokenizers_apart() -> None:
    other_bos = HuggingFaceTokenizer(BPE._tokenizer, bos="a")
    assert (
        len({t.fingerprint for t in (BYTES, BPE, train_bpe(CORPUS, 319), train_bpe(CORPUS[:1], 280), other_bos)}) == 5
    )
    assert all(len(t.fingerprint) == 64 for t in (BYTES, BPE))


def test_bytes_by_name() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)
    assert tokenizer.decode([256, 104, 105]) == "hi"


def save_with(directory: Path, special: list[str], **files: object) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = []
    del definition["model"]["vocab"][BOS]
    definition["model"]["vocab"] |= {"<|filler|>": 0}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["<s>", "<|begin_of_text|>", "<|endoftext|>"])
def test_bos_with_a_common_name_is_found(name: str, tmp_path: Path) -> None:
    save_with(tmp_path, ["<pad>", name])
    assert load_tokenizer(tmp_path).bos_id == 321


@pytest.mark.parametrize("token", ["<start>", {"content": "<start>", "lstrip": False}], ids=["text", "table"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_the_named_bos_goes_before_common_names(file: str, token: object, tmp_path: Path) -> None:
    save_with(tmp_path, ["<s>", "<start>"], **{file: {"bos_token": token}})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 321
    assert tokenizer.vocab_size == 322


def test_without_any_bos(tmp_path: Path) -> None:
    save_with(tmp_path, ["<pad>"], tokenizer_config={"bos_token": None})
    assert load_tokenizer(tmp_path).bos_id is None


def test_padding_and_truncation_in_the_file_are_off(tmp_path: Path) -> None:
    save_with(tmp_path, ["<s>"])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("more than three tokens, fewer than a thousand")).endswith("thousand")
    assert len(tokenizer.encode("a")) == 1


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"model": 3}', "is not a Hugging Face tokenizer"),
        ('{"format": "longread-bytes", "format_version": 9}', "format version 9; this Longread reads 1"),
    ],
)
def test_a_wrong_file_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        load_tokenizer(write(tmp_path / "tokenizer.json", text))


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="has no tokens"):
        HuggingFaceTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    for spec in (tmp_path, tmp_path / "nowhere", "gpt2"):
        with pytest.raises(UserError, match="no tokenizer at"):
            load_tokenizer(spec)


def test_a_bos_that_is_no_token_is_refused(tmp_path: Path) -> None:
    save_with(tmp_path, ["<s>"], tokenizer_config={"bos_token": "<absent>"})
    with pytest.raises(UserError, match="'<absent>' is not in the tokenizer's vocabulary"):
        load_tokenizer(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        BYTES.save(write(tmp_path / "file", "") / "below")
