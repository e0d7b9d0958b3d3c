"""A converted model's tokenizer: the ids of the source's, and a beginning as its makers mean it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longread.pretrained.gguf_tokenizer import write_tokenizer
from longread.pretrained.tokenizer import copy_with_beginning
from longread.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.gguf_files import byte_tokens

TEXT = "Hello  wörld, it's 12345 o'clock!\n\n\tdef f(x): return x**2  # 中文 <|im_start|> </s>\r\n"
WORDS = "the reader reads a text, and the text is read; 12 and 345, it's hers: HELLO Hello"


def save(directory: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def byte_level(*special: str, template: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE with special tokens, and what a template puts before texts."""
    made = tokenizers.Tokenizer.from_str(_trained())
    made.add_special_tokens(list(special))
    if template:
        ids = [(template, made.token_to_id(template))]
        made.post_processor = processors.TemplateProcessing(single=f"{template} $A", special_tokens=ids)
    return made


def _trained() -> str:
    made = train_bpe([WORDS] * 20, 330)
    definition = json.loads(made._tokenizer.to_str())
    definition["added_tokens"] = []
    return json.dumps(definition)


A_TOKEN = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": False}
KINDS: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "SmolLM2 names a BOS that it does not add": (
        lambda: byte_level("<|im_start|>", "<|im_end|>"),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
        None,
    ),
    "Qwen has none": (
        lambda: byte_level("<|endoftext|>", "<|im_start|>"),
        {"bos_token": None, "add_bos_token": False, "eos_token": "<|endoftext|>"},
        None,
    ),
    "one with a common name that is not said to be BOS": (lambda: byte_level("<|endoftext|>"), {}, None),
    "Llama 3 has a template": (
        lambda: byte_level("<|begin_of_text|>", "<|eot_id|>", template="<|begin_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|begin_of_text|>",
    ),
    "a token as a table, and a template": (
        lambda: byte_level("<s>", "</s>", template="<s>"),
        {"bos_token": A_TOKEN, "add_bos_token": True},
        "<s>",
    ),
    "a template that adds what nobody names": (lambda: byte_level("<bos>", template="<bos>"), {}, "<bos>"),
    "Llama 2's class adds what is said, without a template": (
        lambda: byte_level("<s>"),
        {"bos_token": "<s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"},
        "<s>",
    ),
    "other classes do not": (lambda: byte_level("<s>"), {"bos_token": "<s>", "add_bos_token": True}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_begins_as_with_the_source(kind: str, tmp_path: Path) -> None:
    make, settings, bos = KINDS[kind]
    source = save(tmp_path / "source", make(), **settings)
    (tmp_path / "copy").mkdir()
    copied = copy_with_beginning(source, tmp_path / "copy")
    number = make().token_to_id(bos) if bos else None
    assert copied.beginning == ([] if number is None else [number])
    again = load_tokenizer(tmp_path / "copy")
    assert (again.fingerprint, again.beginning) == (copied.fingerprint, copied.beginning)
    if settings and "Llama" not in settings.get("tokenizer_class", ""):  # which makes another tokenizer of the file
        theirs, ours = (PreTrainedTokenizerFast.from_pretrained(path) for path in (source, tmp_path / "copy"))
        plain = "Hello wörld, it's 12345"
        assert theirs.encode(plain) == ours.encode(plain) == [*copied.beginning, *copied.encode(plain)]
        assert (theirs.bos_token, theirs.eos_token) == (ours.bos_token, ours.eos_token)


def test_a_special_token_spelled_out_stays_text(tmp_path: Path) -> None:
    source = save(tmp_path / "source", byte_level("<|im_start|>", "</s>"), bos_token="<|im_start|>")
    (tmp_path / "copy").mkdir()
    copied = copy_with_beginning(source, tmp_path / "copy")
    ids = copied.encode(TEXT)
    special = {byte_level("<|im_start|>", "</s>").token_to_id(token) for token in ("<|im_start|>", "</s>")}
    assert not special & set(ids)
    assert copied.decode(ids) == TEXT


def test_what_says_more_is_copied(tmp_path: Path) -> None:
    source = save(tmp_path / "source", byte_level("<s>"), chat_template="{{ messages }}", bos_token="<s>")
    (source / "chat_template.jinja").write_text("{{ messages[0] }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "copy").mkdir()
    copy_with_beginning(source, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_a_tokenizer_that_begins_with_several_tokens_is_refused(tmp_path: Path) -> None:
    made = byte_level("<s>", "<t>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> <t> $A", special_tokens=[("<s>", made.token_to_id("<s>")), ("<t>", made.token_to_id("<t>"))]
    )
    source = save(tmp_path / "source", made)
    (tmp_path / "copy").mkdir()
    with pytest.raises(ValueError, match="puts 2 tokens before a text; Longread knows one at most"):
        copy_with_beginning(source, tmp_path / "copy")


def from_gguf(said: dict[str, Any], directory: Path) -> Tokenizer:
    directory.mkdir()
    return write_tokenizer({f"tokenizer.ggml.{name}": value for name, value in said.items()}, directory, "a.gguf")


def gpt2(pre: str, special: list[str], *, first: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a GGUF says of a byte-level BPE, and the model of the tokenizer.json that it was made from."""
    trained = json.loads(_trained())["model"]
    words = sorted((token for token in trained["vocab"] if token not in byte_tokens()), key=trained["vocab"].get)
    merges = [" ".join(merge) for merge in trained["merges"]]
    plain = [*byte_tokens(), *words[1:]]
    tokens = [*special, *plain] if first else [*plain, *special]
    kinds = [3 if token in special else 1 for token in tokens]
    said = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    return said, {
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [tuple(m.split(" ")) for m in merges],
    }


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    by_rule = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([by_rule, pre_tokenizers.ByteLevel(False, use_regex=False)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
RULES = {
    "gpt-2": pre_tokenizers.ByteLevel(False),
    "smollm": DIGITS,
    "llama-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace("{1,3}", "")),
}


@pytest.mark.parametrize("first", [True, False], ids=["special tokens first", "special tokens last"])
@pytest.mark.parametrize("pre", RULES)
def test_byte_level_tokenizers_of_gguf(pre: str, first: bool, tmp_path: Path) -> None:
    said, model = gpt2(pre, ["<|im_start|>", "</s>"], first=first)
    made = from_gguf(said | {"bos_token_id": said["tokens"].index("<|im_start|>")}, tmp_path / "made")
    theirs = tokenizers.Tokenizer(models.BPE(**model, ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer = RULES[pre]
    theirs.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        theirs.normalizer = normalizers.NFC()
    for text in (TEXT, WORDS, "e\u0301 1234 a1"):
        assert made.encode(text) == theirs.encode(text).ids
    assert made.decode(made.encode(TEXT)) == TEXT
    assert made.beginning == ([said["tokens"].index("<|im_start|>")] if pre == "llama-bpe" else [])
    assert made.vocab_size == len(said["tokens"])


def test_a_gguf_says_whether_texts_begin_with_bos(tmp_path: Path) -> None:
    said, _ = gpt2("gpt-2", ["<s>"])
    number = said["tokens"].index("<s>")
    for adds in (True, False):
        made = from_gguf(said | {"bos_token_id": number, "add_bos_token": adds}, tmp_path / str(adds))
        assert made.beginning == ([number] if adds else [])


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
WORDS_OF_PIECES = [*"▁helowrd", "▁h", "ll", "el", "ell", "▁hell", "▁hello", "or", "wor", "ld"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokenizers_of_gguf(prefix: bool, tmp_path: Path) -> None:
    """The merges follow from the scores: the likeliest pair that makes a piece is joined first."""
    tokens = [*PIECES, *WORDS_OF_PIECES]
    scores = [0.0] * len(PIECES) + [-1000.0] * 8 + [-float(i) for i in range(len(WORDS_OF_PIECES) - 8)]
    said = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS_OF_PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": prefix,
    }
    made = from_gguf(said, tmp_path / "made")

    def pieces(text: str) -> list[str]:
        return [tokens[i] for i in made.encode(text)]

    assert made.beginning == [1]
    assert pieces(" hello world") == [*(["▁"] if prefix else []), "▁hello", "▁", "wor", "ld"]
    assert pieces("hello") == (["▁hello"] if prefix else ["h", "ell", "o"])
    assert pieces("hello é")[-3:] == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("hello  world é", " hello", "<s> hello</s>"):
        assert made.decode(made.encode(text)) == text
        assert not {1, 2} & set(made.encode(text))
