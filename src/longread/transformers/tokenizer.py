"""The tokenizers of Longread as one of Transformers: the same ids, and a text begins as it does there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longread.config import UserError
from longread.tokenizer import BOS, ByteTokenizer, Tokenizer, load_tokenizer

BYTE_CHARACTERS = sorted(range(256), key=lambda b: (not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255), b))
"""Bytes in the order in which byte-level tokenizers give them characters: printable ones are themselves."""


class LongreadTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a model directory.

    A text begins with the BOS that Longread puts there, ends where another would begin, and is padded on the left. A
    special token that is spelled out in a text is the characters that it is, unless there is a chat template, which
    writes special tokens (`split_special_tokens` says otherwise).

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  # as the base class has it
    padding_side = "left"

    def __init__(self, *arguments: Any, definition_file: str | None = None, **named: Any) -> None:
        self._definition: Tokenizer | None = None
        if definition_file is not None:
            self._definition = load_tokenizer(Path(definition_file))
            named["tokenizer_object"], bos = _backend(self._definition, Path(definition_file))
            for name in ("bos_token", "eos_token", "pad_token"):
                if named.get(name) is None:
                    named[name] = bos
        elif named.get("tokenizer_object") is None:
            raise UserError("there is no tokenizer.json; copy there the one that the model was trained with")
        named.setdefault("split_special_tokens", named.get("chat_template") is None)
        named.setdefault("clean_up_tokenization_spaces", False)
        named.setdefault("padding_side", "left")
        super().__init__(*arguments, **named)

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """Keeps the file to this class: that of a tokenizer of bytes is none that others could read."""
        files = {name: path for name, path in resolved_vocab_files.items() if name != "tokenizer_file"}
        files["definition_file"] = resolved_vocab_files.get("tokenizer_file")
        return super()._from_pretrained(files, *arguments, **named)

    @classmethod
    def convert_to_native_format(cls, **named: Any) -> dict[str, Any]:
        """The arguments as they are: what the file says is read where the tokenizer is made."""
        return {name: value for name, value in named.items() if name != "trust_remote_code"}

    def save_pretrained(self, save_directory: Any, *arguments: Any, **named: Any) -> Any:
        """Writes what `longread.load_tokenizer` and `from_pretrained` read."""
        written = super().save_pretrained(save_directory, *arguments, **named)
        if isinstance(self._definition, ByteTokenizer):
            self._definition.save(Path(save_directory))
        return written


def _backend(definition: Tokenizer, path: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """A tokenizer of the library `tokenizers` with the same ids, and the BOS that it puts before a text."""
    own = isinstance(definition, ByteTokenizer)
    backend = bytes_backend() if own else tokenizers.Tokenizer.from_file(str(path))
    bos = None if definition.bos_id is None else backend.id_to_token(definition.bos_id)
    backend.no_padding()
    backend.no_truncation()
    if bos is not None:
        pair = f"{bos} $A {bos} $B"
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=pair, special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend, bos


def bytes_backend() -> tokenizers.Tokenizer:
    """The tokenizer of bytes: ids 0 to 255 and, for BOS, 256."""
    alphabet, extra = {}, 256
    for byte in BYTE_CHARACTERS:
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        alphabet[chr(byte if printable else extra)] = byte
        extra += not printable
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(BOS, special=True, normalized=False)])
    return backend
