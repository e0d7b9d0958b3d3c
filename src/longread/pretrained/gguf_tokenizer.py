"""The tokenizer that a GGUF file describes, as a tokenizer.json.

Two kinds: "gpt2", byte-level BPE, whose rule of splitting is named (`tokenizer.ggml.pre`); and "llama", SentencePiece's
BPE, whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from longread.config import UserError
from longread.pretrained.tokenizer import write_settings
from longread.tokenizer import FILE_NAME, Tokenizer, load_tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splitting(NamedTuple):
    """How a text is split into words."""

    pattern: str | None = None
    """None: by the rule of GPT-2."""
    digits: bool = False
    """Every digit is a word."""
    ignore_merges: bool = False
    """A word that is a token is that token, whatever merges would make of it."""
    normal_form: bool = False
    """Characters are composed first (NFC)."""
    adds_bos: bool = False
    """Where the file does not say."""


_LLAMA3 = _Splitting(rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, adds_bos=True)
_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitting(rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}", normal_form=True),
    "tekken": _Splitting(_TEKKEN, ignore_merges=True, adds_bos=True),
}


def write_tokenizer(said: Mapping[str, Any], directory: Path, where: str) -> Tokenizer:
    """Writes the tokenizer of a GGUF file with these metadata, and opens it.

    Raises:
        UserError: it has none, or one of a kind that is not known.
    """
    kind, tokens = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{where} holds no tokenizer; give one with --tokenizer")
    splitting = None
    if kind == "gpt2":
        name = said.get("tokenizer.ggml.pre", "gpt-2")
        splitting = _SPLITTINGS.get(name)
        if splitting is None:
            raise UserError(
                f"{where} splits texts by the rule {name!r}; known are {', '.join(_SPLITTINGS)}: give the "
                "model's tokenizer with --tokenizer"
            )
    elif kind != "llama":
        raise UserError(f"{where} has a tokenizer of kind {kind!r}; give the model's tokenizer with --tokenizer")
    definition = _byte_level(said, tokens, splitting) if splitting else _sentence_piece(said, tokens)
    if "tokenizer.huggingface.json" in said:
        definition = json.loads(said["tokenizer.huggingface.json"])
    try:
        tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the tokenizer in {where} cannot be read: {error}; give one with --tokenizer") from None
    (directory / FILE_NAME).write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for part, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = said.get(f"tokenizer.ggml.{name}_token_id")
        settings[f"{part}_token"] = tokens[i] if i is not None and 0 <= i < len(tokens) else None
    if "tokenizer.chat_template" in said:
        settings["chat_template"] = said["tokenizer.chat_template"]
    adds = said.get("tokenizer.ggml.add_bos_token", splitting.adds_bos if splitting else True)
    write_settings(directory, settings, settings["bos_token"] if adds else None)
    ends = [said[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in said]
    if ends:
        text = json.dumps({"eos_token_id": ends if len(set(ends)) > 1 else ends[0]})
        (directory / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    return load_tokenizer(directory)


def _byte_level(said: Mapping[str, Any], tokens: list[str], splitting: _Splitting) -> dict[str, Any]:
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": splitting.pattern is None,
    }
    steps: list[dict[str, Any]] = [bytes_]
    if splitting.digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    if splitting.pattern is not None:
        pattern = {"Regex": splitting.pattern}
        steps.insert(0, {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    added = _added(said, tokens)
    # A special token at the end of the vocabulary need not be known to the model; in between, its number would be lost.
    last = next((i for i in reversed(range(len(tokens))) if i not in added), -1)
    return _definition(
        model={
            "vocab": {token: i for i, token in enumerate(tokens[: last + 1])},
            "merges": [_pair(merge) for merge in said.get("tokenizer.ggml.merges", ())],
            "ignore_merges": splitting.ignore_merges,
        },
        added=added,
        normalizer={"type": "NFC"} if splitting.normal_form else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def _sentence_piece(said: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    prefix = bool(said.get("tokenizer.ggml.add_space_prefix", True))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = said.get("tokenizer.ggml.unknown_token_id", 0)
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    return _definition(
        model={
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(tokens, said.get("tokenizer.ggml.scores") or [-float(i) for i in range(len(tokens))]),
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
        added=_added(said, tokens),
        normalizer={"type": "Sequence", "normalizers": [*before, space]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": back},
    )


def _definition(*, model: dict[str, Any], added: dict[int, dict[str, Any]], **steps: Any) -> dict[str, Any]:
    options = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added.values()),
        **steps,
        "post_processor": None,
        "model": {"type": "BPE"} | options | flags | model,
    }


def _added(said: Mapping[str, Any], tokens: list[str]) -> dict[int, dict[str, Any]]:
    """Tokens that are found in a text before anything else, or, the special ones, in none, by their numbers."""
    kinds = said.get("tokenizer.ggml.token_type") or []
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        i: {"id": i, "content": tokens[i], **plain, "special": kind != _USER_DEFINED}
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }


def _pair(merge: str) -> list[str]:
    """The two halves of a merge, between which stands a space; a half may begin with one that is no separator."""
    left, _, right = merge[1:].partition(" ")
    return [merge[:1] + left, right]


def _merges(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """The merges of SentencePiece's BPE, the likeliest first: every two pieces that make a third.

    Of those that make the same one, the pair of the lowest numbers comes first.
    """
    number = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int]] = []
    for whole, i in number.items():
        for cut in range(1, len(whole)):
            left, right = number.get(whole[:cut]), number.get(whole[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
    return [[tokens[left], tokens[right]] for _, _, left, right in sorted(found)]
