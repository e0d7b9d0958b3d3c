"""The tokenizers of Longread in Transformers: the same ids and texts, and files that both read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longread.config import UserError
from longread.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer, train_bpe
from longread.transformers import LongreadTokenizer
from longread.transformers.tokenizer import bytes_backend
from tests.small_model import save_small_model

TEXTS = ["Hello, wörld! \U0001f600  <|bos|> x\n\n ", "", " a", "\x00\x01\x7f\x80ÿ"]


@pytest.fixture(params=["bytes", "bpe", "no bos"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model directory with a tokenizer."""
    directory = tmp_path / "model"
    save_small_model(directory, seed=0, window_size=16, mini_batch_size=8)
    if request.param != "bytes":
        made = train_bpe(["Hello world. " * 20, "a b c"], 280)
        if request.param == "no bos":
            made = HuggingFaceTokenizer(made._tokenizer, has_bos=False)
        made.save(directory)
    return directory


def test_ids_and_texts_are_those_of_longread(place: Path) -> None:
    found, native = AutoTokenizer.from_pretrained(place), load_tokenizer(place)
    assert type(found) is LongreadTokenizer
    assert len(found) == native.vocab_size
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert ids == native.beginning + native.encode(text)
        assert found.decode(ids, skip_special_tokens=True) == text
        assert found(text, add_special_tokens=False)["input_ids"] == native.encode(text)
    bos = native.bos_id
    assert [found.bos_token_id, found.eos_token_id, found.pad_token_id] == [bos] * 3


def test_rows_are_padded_on_the_left(tmp_path: Path) -> None:
    save_small_model(tmp_path, seed=0, window_size=16, mini_batch_size=8)
    found = AutoTokenizer.from_pretrained(tmp_path)(["abc", "d"], padding=True, return_tensors="pt")
    assert found["input_ids"].tolist() == [[256, 97, 98, 99], [256, 256, 256, 100]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert set(found) == {"input_ids", "attention_mask"}


def test_what_is_saved_both_read(place: Path, tmp_path: Path) -> None:
    """Once more after it was saved, and by what models call it."""
    native, saved = load_tokenizer(place), tmp_path / "saved"
    AutoTokenizer.from_pretrained(place).save_pretrained(saved)
    shutil.copy(place / "config.json", saved)
    again = load_tokenizer(saved)
    assert (again.fingerprint, again.bos_id, type(again)) == (native.fingerprint, native.bos_id, type(native))
    AutoTokenizer.from_pretrained(saved).save_pretrained(saved)
    found = AutoTokenizer.from_pretrained(saved)
    assert type(found) is LongreadTokenizer
    for text in TEXTS:
        assert found(text)["input_ids"] == native.beginning + native.encode(text)
    assert load_tokenizer(saved).fingerprint == native.fingerprint


def test_only_a_chat_template_writes_special_tokens(tmp_path: Path) -> None:
    save_small_model(tmp_path, seed=0, window_size=16, mini_batch_size=8)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert 256 not in plain("a<|bos|>", add_special_tokens=False)["input_ids"]
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<|bos|>{{ m['content'] }}{% endfor %}")
    found = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert found.apply_chat_template(chat, return_dict=True)["input_ids"] == [256, 97, 256, 98]
    strict = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert 256 not in strict("a<|bos|>", add_special_tokens=False)["input_ids"]


def test_bytes_are_bytes() -> None:
    """Every one, also those that make no character."""
    backend, native = bytes_backend(), ByteTokenizer()
    assert backend.get_vocab_size() == native.vocab_size == 257
    for first in range(0, 0x800, 64):
        text = "".join(map(chr, range(first, first + 64)))
        assert backend.encode(text, add_special_tokens=False).ids == native.encode(text)
    for byte in range(256):
        assert backend.decode([byte, 97]) == native.decode([byte, 97])


def test_nothing_to_read_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"there is no tokenizer.json"):
        LongreadTokenizer()
