"""`longread convert`: to the official layout and back, with nothing lost on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from longread.checkpoint import load_model, save_model
from longread.cli import main
from longread.loading import find_model, open_model
from longread.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from tests import tiny

TEXTS = ["one text of words, and another of other words"] * 3


def convert(source: str | Path, destination: Path) -> int:
    return main(["convert", str(source), str(destination)])


def files_of(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files."""
    return {path.name: path.read_bytes() for path in directory.glob("*tok*.json")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back_it_is_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    inner = dataclasses.replace(tiny.INNER, clip=None, warmup_from=0.3, warmup_steps=17)
    tokenizer = train_bpe(TEXTS, 300)
    model = tiny.make(dtype=dtype, vocab_size=tokenizer.vocab_size, tie_embeddings=False, qk_norm=False)
    save_model(tmp_path / "mine", model, inner, tokenizer.fingerprint)
    tokenizer.save(tmp_path / "mine")

    assert convert(tmp_path / "mine", tmp_path / "official") == 0
    assert convert(tmp_path / "official", tmp_path / "back") == 0
    before, after = load_model(tmp_path / "mine"), load_model(tmp_path / "back")
    assert after.fingerprint == before.fingerprint
    assert (after.inner, after.model.config, after.model.dtype) == (inner, model.config, dtype)
    assert after.metadata["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert files_of(tmp_path / "back") == files_of(tmp_path / "official") == files_of(tmp_path / "mine")
    assert len(files_of(tmp_path / "back")) == 2
    assert open_model(tmp_path / "back", "cpu").tokenizer.beginning == tokenizer.beginning


def test_the_model_in_the_box_by_name(tmp_path: Path) -> None:
    assert convert("longread-small", tmp_path / "official") == 0
    assert convert(tmp_path / "official", tmp_path / "back") == 0
    assert load_model(tmp_path / "back").fingerprint == load_model(find_model("longread-small")).fingerprint
    assert files_of(tmp_path / "back") == files_of(find_model("longread-small"))
    opened = open_model(tmp_path / "back", "cpu")
    assert "".join(opened.session().write("Once upon a time", max_tokens=4, seed=0))


def test_a_bos_that_a_map_of_special_tokens_names(tmp_path: Path) -> None:
    """The official layout knows no tokenizer; what lies beside it is kept as it is."""
    tokenizer = train_bpe(TEXTS, 300)
    save_model(tmp_path / "mine", tiny.make(vocab_size=400), tiny.INNER, None)
    assert convert(tmp_path / "mine", tmp_path / "official") == 0
    tokenizer.save(tmp_path / "official")
    (tmp_path / "official" / "tokenizer_config.json").unlink()
    named = {"bos_token": {"content": "t"}}
    (tmp_path / "official" / "special_tokens_map.json").write_text(json.dumps(named))
    assert convert(tmp_path / "official", tmp_path / "back") == 0
    beginning = open_model(tmp_path / "back", "cpu").tokenizer.beginning
    assert beginning == load_tokenizer(tmp_path / "official").beginning != tokenizer.beginning
    assert convert(tmp_path / "back", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "special_tokens_map.json").read_text()) == named


def test_without_a_tokenizer_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "mine", tiny.make(), tiny.INNER, None)
    for source, destination in (("mine", "official"), ("official", "back")):
        assert convert(tmp_path / source, tmp_path / destination) == 0
        assert "without a tokenizer" in capsys.readouterr().out
    assert not files_of(tmp_path / "back")


def test_a_tokenizer_that_does_not_belong_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "mine", tiny.make(vocab_size=300), tiny.INNER, "0" * 64)
    ByteTokenizer().save(tmp_path / "mine")
    assert convert(tmp_path / "mine", tmp_path / "official") == 2
    assert "is not the tokenizer of" in capsys.readouterr().err

    save_model(tmp_path / "small", tiny.make(vocab_size=200), tiny.INNER, None)
    assert convert(tmp_path / "small", tmp_path / "converted") == 0
    ByteTokenizer().save(tmp_path / "converted")
    assert convert(tmp_path / "converted", tmp_path / "back") == 2
    assert "has 257 tokens and the model knows 200" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "mine", "small"]


def test_what_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "mine", tiny.make(), tiny.INNER, None)
    assert convert(tmp_path / "mine", tmp_path / "mine") == 2
    assert "already exists" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "mine", tmp_path / "empty") == 0
    assert convert(tmp_path / "unknown", tmp_path / "new") == 2
    assert "there is no model at" in capsys.readouterr().err
