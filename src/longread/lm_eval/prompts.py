"""The texts of requests as token ids: what stands before them, where continuations begin, what ends an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from longread.config import UserError
from longread.tokenizer import FILE_NAME, Tokenizer

_FACTS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one counts
_GENERATION = "generation_config.json"


class Prompts:
    """How one model's tokenizer is used.

    Args:
        directory: of the tokenizer's files.
        vocab_size: of the model.
        prefix_token_id: stands before a text without a context; None: what the tokenizer puts before every text.
    """

    def __init__(
        self, tokenizer: Tokenizer, directory: Path, vocab_size: int, prefix_token_id: int | None = None
    ) -> None:
        if prefix_token_id is not None and not 0 <= prefix_token_id < vocab_size:
            raise UserError(f"prefix_token_id is {prefix_token_id}; the model knows ids 0 to {vocab_size - 1}")
        self.tokenizer, self._directory = tokenizer, directory
        self.before_all = tokenizer.beginning if prefix_token_id is None else [prefix_token_id]
        """The ids before a text that has no context."""
        self.special = _special_tokens(directory)
        """Special tokens by the text that they are written as."""
        self.eos_id, self.ends = self._ends()
        self.chat = False
        """Whether prompts are chats, in which a special token that is written out means itself."""
        self._marked: tokenizers.Tokenizer | None = None

    def _ends(self) -> tuple[int | None, frozenset[int]]:
        """The token that ends a text, and all that end an answer."""
        spelled = None
        for name in _FACTS:
            token = facts_of(self._directory / name).get("eos_token", spelled)
            spelled = token.get("content") if isinstance(token, dict) else token
        eos = self.special.get(spelled) if isinstance(spelled, str) else None
        named = facts_of(self._directory / _GENERATION).get("eos_token_id")
        others = named if isinstance(named, list) else [named]
        known = {i for i in others if isinstance(i, int) and 0 <= i < self.tokenizer.vocab_size}
        ends = known | {eos} if eos is not None else known
        return eos if eos is not None else min(known, default=None), frozenset(ends | set(self.tokenizer.beginning))

    def whole(self, text: str) -> list[int]:
        """A text that begins: with what the tokenizer puts before it."""
        return [*self.tokenizer.beginning, *self.tokenizer.encode(text)]

    def document(self, text: str) -> list[int]:
        """A text without a context."""
        return [*self.before_all, *self.tokenizer.encode(text)]

    def prompt(self, text: str) -> list[int]:
        """A context: a text that begins, or a chat, whose template may have written the beginning itself."""
        if not text:
            return list(self.before_all)
        if not self.chat:
            return self.whole(text)
        ids, beginning = self._encode_marked(text), self.tokenizer.beginning
        return ids if ids[: len(beginning)] == beginning else [*beginning, *ids]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of what is scored after it."""
        if not context:
            return list(self.before_all), self.tokenizer.encode(continuation)
        whole, kept = self.prompt(context + continuation), context.rstrip()
        before = self.prompt(kept) if kept else list(self.tokenizer.beginning)
        scored = whole[len(before) :]
        if scored or not continuation:
            return before, scored
        same = _common(before, whole)  # the last token of the context has grown by all of the continuation
        return whole[:same], whole[same:]

    def stops(self, until: Sequence[str]) -> tuple[tuple[str, ...], frozenset[int]]:
        """Where an answer ends: the texts before which it does, and the tokens, those included that are spelled out."""
        texts = tuple(text for text in until if text and text not in self.special)
        return texts, self.ends | {self.special[text] for text in until if text in self.special}

    def _encode_marked(self, text: str) -> list[int]:
        """As the tokenizer, but for special tokens that are written out: they are themselves."""
        path = self._directory / FILE_NAME
        if not self.special:
            return self.tokenizer.encode(text)
        if self._marked is None:
            self._marked = tokenizers.Tokenizer.from_file(str(path))
            self._marked.no_padding()
            self._marked.no_truncation()
        return list(self._marked.encode(text, add_special_tokens=False).ids)


def _special_tokens(directory: Path) -> dict[str, int]:
    added = facts_of(directory / FILE_NAME).get("added_tokens", ())
    return {token["content"]: token["id"] for token in added if token.get("special")}


def facts_of(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file beside the tokenizer; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return value if isinstance(value, dict) else {}


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """So many first ids are the same."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
