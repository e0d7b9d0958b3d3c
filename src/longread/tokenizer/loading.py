"""Opening the tokenizer that a name or a path stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import tokenizers

from longread.config import UserError
from longread.tokenizer.byte import ByteTokenizer
from longread.tokenizer.contract import Tokenizer
from longread.tokenizer.definition import BYTES, CONFIG_NAME, FILE_NAME, SPECIAL_NAME, read_json
from longread.tokenizer.hugging_face import HuggingFaceTokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes", a `tokenizer.json`, or a directory holding one.

    BOS is what `tokenizer_config.json` or `special_tokens_map.json` beside it says, else a token with a common name.
    Raises `UserError` when there is none or it cannot be read.
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
    return HuggingFaceTokenizer(tokenizer, _named_bos(path.parent))


def _named_bos(directory: Path) -> str | None:
    for name in (CONFIG_NAME, SPECIAL_NAME):
        path = directory / name
        token = read_json(path).get("bos_token") if path.is_file() else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def copy_tokenizer(path: Path, directory: Path) -> None:
    """Copies a tokenizer.json, and what `load_tokenizer` reads beside it, as they are. Raises `UserError`."""
    for name in (FILE_NAME, CONFIG_NAME, SPECIAL_NAME):
        if (path.parent / name).is_file():
            try:
                shutil.copyfile(path.parent / name, directory / name)
            except OSError as error:
                raise UserError(f"cannot copy {path.parent / name} to {directory}: {error.strerror}") from None
