"""Opening the tokenizer that a name or a path stands for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tokenizers

from longread.config import UserError
from longread.tokenizer.byte import ByteTokenizer
from longread.tokenizer.contract import Tokenizer
from longread.tokenizer.definition import BYTES, CONFIG_NAME, FILE_NAME, SPECIAL_NAME, read_json
from longread.tokenizer.hugging_face import HuggingFaceTokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes", a `tokenizer.json`, or a directory holding one.

    BOS is what `tokenizer_config.json` beside it says, else `special_tokens_map.json`, else as `HuggingFaceTokenizer`
    finds it. `"bos_token": null` and `"add_bos_token": false` are answers too: there is none then. Raises `UserError`
    when there is no tokenizer, it cannot be read, or what lies beside it contradicts itself.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"no tokenizer at {spec}; give bytes, a {FILE_NAME}, or a directory that holds one")
    definition = read_json(path)
    if definition.get("format") == BYTES["format"]:
        if definition != BYTES:
            raise UserError(f"{path} has format version {definition.get('format_version')}; this Longread reads 1")
        return ByteTokenizer()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a Hugging Face tokenizer: {error}") from None
    has_bos, bos = _bos_beside(path.parent)
    return HuggingFaceTokenizer(tokenizer, bos, has_bos=has_bos)


def copy_tokenizer(path: Path, directory: Path) -> None:
    """Copies a tokenizer.json, and what `load_tokenizer` reads beside it, as they are. Raises `UserError`."""
    for name in (FILE_NAME, CONFIG_NAME, SPECIAL_NAME):
        if (path.parent / name).is_file():
            try:
                shutil.copyfile(path.parent / name, directory / name)
            except OSError as error:
                raise UserError(f"cannot copy {path.parent / name} to {directory}: {error.strerror}") from None


def _bos_beside(directory: Path) -> tuple[bool, str | None]:
    """Whether texts begin with a BOS token, and which; None leaves that to the tokenizer."""
    files = [directory / name for name in (CONFIG_NAME, SPECIAL_NAME)]
    facts = [read_json(path) if path.is_file() else {} for path in files]
    adds = facts[0].get("add_bos_token")
    named = [
        _content(found["bos_token"], path) for found, path in zip(facts, files, strict=True) if "bos_token" in found
    ]
    bos = named[0] if named else None
    if adds is True and named and bos is None:
        raise UserError(f"{files[0]} says add_bos_token and names no bos_token; name one, or say false")
    return adds is not False and (bos is not None or not named), bos


def _content(token: Any, path: Path) -> str | None:
    """The text of a token as configurations write it: itself, or in a table."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str | None):
        raise UserError(f"bos_token in {path} is {token!r}; it must be a token or null")
    return token or None
