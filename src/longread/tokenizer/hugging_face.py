"""Any tokenizer that the `tokenizers` library can run, and how many bytes of a text each of its tokens covers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import tokenizers

from longread.config import UserError
from longread.tokenizer.borders import Borders, is_border
from longread.tokenizer.contract import Cut, Tokenizer, utf8
from longread.tokenizer.definition import (
    BYTE,
    CONFIG_NAME,
    FILE_NAME,
    fingerprint,
    former_fingerprint,
    parts,
    write_json,
)

BOS = "<|bos|>"
_COMMON_BOS = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_CLASS = "[CLS]"  # of BERT; it begins a text, but no text goes on from it


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, without whatever makes its encoding random, pads it or cuts it off.

    Args:
        bos: the BOS token. None takes the one that the tokenizer's own template begins with; without a template, one
            with a common name.
        has_bos: False for texts that begin with none.

    Raises:
        UserError: it has no tokens, or no such BOS.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos: str | None = None, *, has_bos: bool = True) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        for name in ("dropout", "alpha", "nbest_size"):  # of BPE; of Unigram, in newer versions of the library
            if getattr(tokenizer.model, name, None) is not None:
                setattr(tokenizer.model, name, None)
        self._tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError("the tokenizer has no tokens; give one that was trained")
        if bos is not None and bos not in vocabulary:
            raise UserError(f"the BOS token {bos!r} is not in the tokenizer's vocabulary of {len(vocabulary)}")
        definition = json.loads(tokenizer.to_str())
        self._bos = (bos or _usual_bos(definition, vocabulary)) if has_bos else None
        self.bos_id = None if self._bos is None else vocabulary[self._bos]
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have holes
        self.fingerprint = fingerprint(definition, self.bos_id)
        self._former_fingerprint = former_fingerprint(definition, self.bos_id)
        self._post_processor = definition.get("post_processor")
        tokenizer.post_processor = None  # it adds special tokens, which nobody wants here, and moves offsets
        self._special = {added["id"] for added in definition.get("added_tokens", ()) if added["special"]}
        self._bytes = byte_level_tokens(definition, vocabulary)
        self._verbatim = self._bytes is not None and _changes_nothing(definition)
        decoder = [step["type"] for step in parts(definition.get("decoder"))]
        self._made_of_bytes = decoder == ["ByteLevel"]
        self._joined = {i for t, i in vocabulary.items() if BYTE.fullmatch(t)} if "ByteFallback" in decoder else set()
        self._probes = [vocabulary[t] for t in ("▁a", "a", "▁", " ", "Ġ", ".", ",", "##s") if t in vocabulary]
        self._borders = Borders(tokenizer, definition)

    def has_fingerprint(self, fingerprint: str) -> bool:
        return fingerprint in (self.fingerprint, self._former_fingerprint)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            utf8(text)
        return [list(e.ids) for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Exact where tokens are made of bytes. Where a normaliser changes or drops characters, their bytes count
        for the token that stands for them or follows them. A text that vanishes altogether gives no tokens."""
        total = len(utf8(text))
        if self._bytes is not None and self._verbatim:
            ids = self.encode_batch([text])[0]
            counts = [len(self._bytes[i]) for i in ids]
            if sum(counts) == total:  # else some bytes have no token
                return ids, counts
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = list(encoding.ids)
        own = None if self._bytes is None else [len(self._bytes[i]) for i in ids]
        return ids, byte_lengths(text, encoding.offsets, own)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(self._checked(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        definition = json.loads(self._tokenizer.to_str()) | {"post_processor": self._post_processor}
        write_json(directory / FILE_NAME, definition)
        write_json(directory / CONFIG_NAME, {"bos_token": self._bos})

    def last_cut(self, text: str, known: int) -> Cut | None:
        utf8(text)
        return self._borders.last_cut(text, known)

    def bytes_of(self, token: int) -> bytes | None:
        self._checked([token])
        if token in self._special:
            return b""
        return self._bytes.get(token, b"") if self._bytes is not None and self._made_of_bytes else None

    def decoding_probes(self) -> list[int]:
        return self._probes

    def joins_bytes(self, token: int) -> bool:
        return token in self._joined


def _usual_bos(definition: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """The token that the template puts before a text; without a template, the first common name there is."""
    for template in parts(definition.get("post_processor")):
        if template["type"] == "TemplateProcessing":
            begin: dict[str, dict[str, str]] = next(iter(template["single"]), {})
            first = begin.get("SpecialToken", {}).get("id")
            return first if first in vocabulary and first != _CLASS else None
    return next((name for name in _COMMON_BOS if name in vocabulary), None)


def _changes_nothing(definition: dict[str, Any]) -> bool:
    """Whether no step before the model adds, drops or changes characters."""
    steps = parts(definition.get("pre_tokenizer"))
    adds = any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
    return definition.get("normalizer") is None and not adds


def byte_level_tokens(definition: dict[str, Any], vocabulary: dict[str, int]) -> dict[int, bytes] | None:
    """The bytes that each token id is, when every character of a token stands for one byte; None for other kinds."""
    if "ByteLevel" not in [step["type"] for step in parts(definition.get("decoder"))]:
        return None
    byte_of = byte_alphabet()
    found = {}
    for token, i in vocabulary.items():
        spelled = [byte_of.get(character) for character in token]
        found[i] = token.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
    return found


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def byte_lengths(text: str, offsets: Sequence[tuple[int, int]], own: Sequence[int] | None) -> list[int]:
    """Bytes of `text` that each token covers, from where it begins and ends in it, in characters.

    Args:
        offsets: of each token.
        own: the bytes of each token itself. They count wherever those of neighbours that share characters sum to what
            these cover, that is, wherever nothing was changed before the tokens were made.

    What lies between two tokens counts for the second, what lies behind the last for the last. Otherwise, tokens with
    one end share a character (byte fallback: one byte each), so each after the first counts one byte.
    """
    bytes_before = [0, *accumulate(len(character.encode()) for character in text)]
    reached = list(accumulate((end for _, end in offsets), max))
    counts = _shared_bytes([bytes_before[end] for end in reached])
    if own is not None:
        begin = 0
        for end in range(1, len(offsets) + 1):
            if end < len(offsets) and not is_border(offsets, reached, end):
                continue
            before = reached[begin - 1] if begin else 0
            first = min(start for start, _ in offsets[begin:end])
            if sum(own[begin:end]) == bytes_before[reached[end - 1]] - bytes_before[max(first, before)]:
                counts[begin:end] = own[begin:end]
                counts[begin] += bytes_before[max(first, before)] - bytes_before[before]
            begin = end
    if counts:
        counts[-1] += bytes_before[-1] - bytes_before[reached[-1]]
    return counts


def _shared_bytes(reached: Sequence[int]) -> list[int]:
    counts: list[int] = []
    start = 0
    for end, run in groupby(reached):
        others = len(list(run)) - 1
        sharing = min(others, end - start)
        counts += [end - start - sharing] + [1] * sharing + [0] * (others - sharing)
        start = end
    return counts
