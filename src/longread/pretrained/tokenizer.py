"""The tokenizer of a source, as its makers mean it.

A document begins with what the source's tokenizer puts there by itself: not with every token that is called BOS. What
else belongs to it (EOS, padding, chat template) is kept in the words of Transformers, for programs that know them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from longread.config import UserError
from longread.tokenizer import FILE_NAME, Tokenizer, load_tokenizer

SETTINGS = "tokenizer_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Of Transformers: tokenizer.json as it is, whatever the model's own class would make of it."""
_ADDING = ("Llama", "CodeLlama", "Gemma")
"""Classes of Transformers that add what `add_bos_token` says; others do what is in tokenizer.json."""
COPIED = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files beside it that say more: which tokens are special, how chats are written, where answers end."""


def copy_with_beginning(source: Path, directory: Path) -> Tokenizer:
    """Copies the tokenizer in `source` so that texts begin as they do with it there, and opens the copy.

    Args:
        source: a directory with a tokenizer.json, or that file.

    Raises:
        UserError: there is none, it cannot be read, or it puts several tokens before a text.
    """
    path = source / FILE_NAME if source.is_dir() else source
    if not path.is_file():
        raise UserError(
            f"{source} has no {FILE_NAME}; save one there with Transformers (AutoTokenizer…save_pretrained), or give "
            "--tokenizer"
        )
    for name in (FILE_NAME, *COPIED):
        found = path if name == FILE_NAME else path.parent / name
        if found.is_file():
            shutil.copyfile(found, directory / name)
    settings = _read(path.parent / SETTINGS)
    write_settings(directory, settings, _beginning(path, settings))
    return load_tokenizer(directory)


def write_settings(directory: Path, settings: dict[str, Any], beginning: str | None) -> None:
    """Writes `settings` so that they say which token texts begin with; None: with none."""
    if beginning is None:
        settings = settings | {"add_bos_token": False}
    elif _content(settings.get("bos_token")) != beginning:
        settings = settings | {"bos_token": beginning}
    settings = {"tokenizer_class": PLAIN_CLASS} | settings
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_settings(source: Path, directory: Path) -> None:
    """Copies what is said of the tokenizer in `source`; a model of another architecture keeps the tokenizer's class."""
    settings = {"tokenizer_class": PLAIN_CLASS} | _read(source / SETTINGS)
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_ids(directory: Path) -> dict[str, int]:
    """The numbers of BOS, EOS and padding of the tokenizer in `directory`, as config.json names them."""
    if not (directory / FILE_NAME).is_file():
        return {}
    tokenizer, settings = _opened(directory / FILE_NAME), _read(directory / SETTINGS)
    found = {}
    for part in ("bos", "eos", "pad"):
        name = _content(settings.get(f"{part}_token"))
        number = None if name is None else tokenizer.token_to_id(name)
        if number is not None:
            found[f"{part}_token_id"] = number
    return found


def _opened(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a Hugging Face tokenizer: {error}") from None


def _beginning(path: Path, settings: dict[str, Any]) -> str | None:
    """The token that the tokenizer puts before a text."""
    adds, named = settings.get("add_bos_token"), _content(settings.get("bos_token"))
    if adds is False:
        return None
    if adds is True and named is not None and str(settings.get("tokenizer_class")).startswith(_ADDING):
        return named
    tokenizer = _opened(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    before = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
    if len(before) > 1:
        raise UserError(f"{path} puts {len(before)} tokens before a text; Longread knows one at most")
    return tokenizer.id_to_token(before[0]) if before else None


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) and found else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; fetch it again")
    return values
