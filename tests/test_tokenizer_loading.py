"""What a tokenizer's files say: its BOS or that it has none, nothing random, a fingerprint of all that decides ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, processors

from longread.config import UserError
from longread.tokenizer import HuggingFaceTokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).parent.parent
BPE = train_bpe(["the tide comes and the tide goes, naïve as ever. " * 60], 320)
DEFINITION: dict[str, Any] = json.loads(BPE._tokenizer.to_str())
SPECIAL = ["<|endoftext|>", "<s>", "<start>"]


def write(directory: Path, template: str | None = None, **files: dict[str, Any]) -> Path:
    """A tokenizer with the tokens SPECIAL, a template that begins with one of them, and the files beside it."""
    vocabulary = {"k": 0, **{token: i for i, token in enumerate(SPECIAL, start=1)}}
    raw = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    raw.add_special_tokens(SPECIAL)
    if template is not None:
        special = [(token, vocabulary[token]) for token in SPECIAL]
        raw.post_processor = processors.TemplateProcessing(f"{template} $A <s>".strip(), special_tokens=special)
    directory.mkdir(exist_ok=True)
    raw.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("template", "config", "special_tokens", "expected"),
    [
        (None, None, None, "<s>"),  # a common name
        (None, {"model_max_length": 1024}, None, "<s>"),
        (None, {"bos_token": "<start>"}, None, "<start>"),
        (None, {"bos_token": {"content": "<start>", "lstrip": False}}, None, "<start>"),
        (None, {"bos_token": None}, None, None),
        (None, {"bos_token": None, "add_bos_token": False}, None, None),
        (None, {"add_bos_token": False, "bos_token": "<|endoftext|>"}, None, None),
        (None, {"add_bos_token": False}, {"bos_token": "<s>"}, None),
        (None, {"add_bos_token": True, "bos_token": "<|endoftext|>"}, None, "<|endoftext|>"),
        (None, {"add_bos_token": True}, {"bos_token": "<start>"}, "<start>"),
        (None, {"add_bos_token": None, "bos_token": "<start>"}, None, "<start>"),
        (None, {"bos_token": None}, {"bos_token": "<s>"}, None),
        (None, {"bos_token": "<start>"}, {"bos_token": "<s>"}, "<start>"),
        (None, {}, {"bos_token": {"content": "<|endoftext|>"}}, "<|endoftext|>"),
        (None, {}, {"bos_token": None}, None),
        (None, {}, {"eos_token": "</s>"}, "<s>"),
        ("<start>", None, None, "<start>"),
        ("", None, None, None),  # a template that puts nothing before a text
        ("<start>", {"bos_token": "<s>"}, None, "<s>"),
        ("<start>", {"bos_token": None}, None, None),
        ("<start>", {"add_bos_token": False}, None, None),
        ("", {"bos_token": "<s>"}, None, "<s>"),
        ("<start>", {"add_bos_token": True}, None, "<start>"),
    ],
)
def test_bos_is_what_the_files_say(
    template: str | None,
    config: dict[str, Any] | None,
    special_tokens: dict[str, Any] | None,
    expected: str | None,
    tmp_path: Path,
) -> None:
    files = {"tokenizer_config": config, "special_tokens_map": special_tokens}
    directory = write(tmp_path / "a", template, **{k: v for k, v in files.items() if v is not None})
    loaded = load_tokenizer(directory)
    assert loaded.bos_id == (None if expected is None else 1 + SPECIAL.index(expected))
    loaded.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert (again.bos_id, again.fingerprint) == (loaded.bos_id, loaded.fingerprint)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"add_bos_token": True, "bos_token": None}, "says add_bos_token and names no bos_token"),
        ({"bos_token": 7}, "bos_token in .* is 7; it must be a token or null"),
        ({"bos_token": {"content": ["<s>"]}}, r"is \['<s>'\]; it must be a token or null"),
        ({"bos_token": "<gone>"}, "'<gone>' is not in the tokenizer's vocabulary"),
    ],
)
def test_files_that_contradict_themselves_are_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        load_tokenizer(write(tmp_path, tokenizer_config=config))


def test_a_class_token_of_bert_is_no_bos() -> None:
    raw = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    assert HuggingFaceTokenizer(raw).bos_id is None


def test_the_model_in_the_box_keeps_its_tokenizer() -> None:
    directory = ROOT / "models" / "longread-small"
    tokenizer = load_tokenizer(directory)
    assert tokenizer.fingerprint == json.loads((directory / "config.json").read_text())["tokenizer_fingerprint"]
    assert tokenizer.bos_id == 0


# --- nothing random ---


def test_dropout_is_off(tmp_path: Path) -> None:
    definition = copy.deepcopy(DEFINITION)
    definition["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    assert {tuple(tokenizer.encode("the tide goes and comes")) for _ in range(20)} == {
        tuple(BPE.encode("the tide goes and comes"))
    }
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text())["model"]["dropout"] is None
    assert (
        tokenizer.fingerprint == HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(json.dumps(DEFINITION))).fingerprint
    )


def test_sampling_of_unigram_is_off() -> None:
    vocabulary = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5)]
    try:
        model = models.Unigram(vocabulary, unk_id=0, alpha=0.1, nbest_size=5)
    except TypeError:
        pytest.skip("this version of the library samples nothing")
    tokenizer = HuggingFaceTokenizer(tokenizers.Tokenizer(model))
    assert {tuple(tokenizer.encode("abab")) for _ in range(50)} == {(3, 3)}


# --- fingerprints ---


def changed(change: Callable[[dict[str, Any]], object]) -> HuggingFaceTokenizer:
    definition = copy.deepcopy(DEFINITION)
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": 320, "content": "tide", "special": False})
    change(definition)
    return HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(json.dumps(definition)))


def swap_merges(definition: dict[str, Any]) -> None:
    merges = definition["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing": lambda d: None,
    "merges": swap_merges,
    "fewer merges": lambda d: d["model"]["merges"].pop(),
    "normalizer": lambda d: d.update(normalizer={"type": "NFC"}),
    "pre_tokenizer": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "unknown": lambda d: d["model"].update(unk_token="!"),
    "byte_fallback": lambda d: d["model"].update(byte_fallback=True),
    "ignore_merges": lambda d: d["model"].update(ignore_merges=True),
    "fuse_unk": lambda d: d["model"].update(fuse_unk=True),
    "prefix": lambda d: d["model"].update(continuing_subword_prefix="##", merges=[]),
    "suffix": lambda d: d["model"].update(end_of_word_suffix="</w>"),
    "special": lambda d: d["added_tokens"][1].update(special=True),
    **{
        flag: lambda d, flag=flag: d["added_tokens"][1].update({flag: True})  # type: ignore[misc]
        for flag in ("single_word", "lstrip", "rstrip", "normalized")
    },
}


def test_fingerprints_tell_whatever_decides_ids() -> None:
    prints = {name: changed(change).fingerprint for name, change in CHANGES.items()}
    assert len(set(prints.values())) == len(CHANGES), prints


def test_fingerprints_do_not_tell_what_decides_no_id() -> None:
    def differently(definition: dict[str, Any]) -> None:
        definition["decoder"] = None
        definition["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
        definition["model"]["dropout"] = 0.1
        definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        definition["added_tokens"][0].update(lstrip=True)  # a special token is looked for in no text

    assert changed(differently).fingerprint == changed(CHANGES["nothing"]).fingerprint


def test_files_of_earlier_versions_are_still_of_their_tokenizer() -> None:
    """They carry a fingerprint without options and flags: this one was written before these were told apart."""
    raw = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    tokenizer = HuggingFaceTokenizer(raw)
    former = "87ae27a32b1b434349f45cf3139c85d5ee5ce4bab57dc3bb9c3b2a35c6976afd"
    assert tokenizer.fingerprint != former
    assert tokenizer.has_fingerprint(tokenizer.fingerprint)
    assert tokenizer.has_fingerprint(former)
    assert not tokenizer.has_fingerprint(BPE.fingerprint)
    assert BPE.has_fingerprint(BPE.fingerprint)


def test_vocabularies_with_flags(tmp_path: Path) -> None:
    raw = tokenizers.Tokenizer.from_str(json.dumps(DEFINITION))
    raw.add_tokens([AddedToken("tide and", normalized=False)])
    tokenizer = HuggingFaceTokenizer(raw)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab_size - 1 in tokenizer.encode("the tide and the")
