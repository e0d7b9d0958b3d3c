"""The file that defines a tokenizer: read, written, and reduced to a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from longread.config import UserError

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
BYTES = {"format": "longread-bytes", "format_version": 1}
"""The definition of the tokenizer of bytes."""
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token for one byte, of a character that has no token of its own (byte fallback)."""


_OPTIONS = {
    "unk_token": (None,),
    "unk_id": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
    "max_input_chars_per_word": (None,),
}
"""The settings that decide ids beside vocabulary and merges, with the values that change nothing."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def fingerprint(definition: dict[str, Any], bos_id: int | None) -> str:
    """Over what decides the ids: not over decoding, padding, or how a version of the library writes its file."""
    model = definition["model"]
    options = {name: model[name] for name, plain in _OPTIONS.items() if model.get(name) not in plain}
    # A special token is never looked for in a text, so how it would be found decides nothing.
    found = [
        [token["id"], *(token[flag] for flag in _FLAGS)] for token in definition["added_tokens"] if not token["special"]
    ]
    details = {name: value for name, value in (("options", options), ("found", found)) if value}
    return _digest(_canonical(definition, bos_id) | details)


def former_fingerprint(definition: dict[str, Any], bos_id: int | None) -> str:
    """As files of earlier versions carry it: without the model's options and the flags of added tokens."""
    return _digest(_canonical(definition, bos_id))


def _canonical(definition: dict[str, Any], bos_id: int | None) -> dict[str, Any]:
    model = definition["model"]
    return {
        "type": model.get("type"),
        "vocabulary": model.get("vocab"),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())],
        "added": [[token["id"], token["content"]] for token in definition.get("added_tokens", ())],
        "normalizer": definition.get("normalizer"),
        "pre_tokenizer": definition.get("pre_tokenizer"),
        "bos_id": bos_id,
    }


def _digest(canonical: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def parts(definition: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as its steps, in order; nested sequences are laid flat."""
    if definition is None:
        return []
    steps = next((value for value in definition.values() if isinstance(value, list)), [])
    if definition["type"] != "Sequence":
        return [definition]
    return [part for step in steps for part in parts(step)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; give a {FILE_NAME} as Hugging Face writes it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; give a {FILE_NAME} as Hugging Face writes it")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, and the directories above it. Raises `UserError` when the place refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
