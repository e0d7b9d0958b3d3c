"""Text to token ids and back: bytes, or any Hugging Face tokenizer file.

No tokenizer adds a beginning-of-sequence token (BOS) to what it encodes, and no text can smuggle one in: a special
token spelled out in a text is encoded as the characters that it is. Whoever starts a document prepends `beginning`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import tokenizers

from longread.config import UserError

FILE_NAME = "tokenizer.json"
BOS = "<|bos|>"
_COMMON_BOS = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_BYTES_DEFINITION = {"format": "longread-bytes", "format_version": 1}
_SMALLEST_BPE = 258  # 256 bytes, BOS, one merge


class Tokenizer(ABC):
    """Ids lie in [0, vocab_size). `fingerprint` is the SHA-256 of what defines the mapping, the BOS included."""

    vocab_size: int
    bos_id: int | None
    fingerprint: str

    @property
    def beginning(self) -> list[int]:
        """The ids before those of a text, where a document starts: BOS, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    @abstractmethod
    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the UTF-8 bytes of `text` that each of them covers; these sum to `len(text.encode())`."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS. Raises `UserError` on a text that is not valid Unicode."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; some tokenizers work on many at once."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS is dropped, invalid UTF-8 becomes U+FFFD. Raises `UserError` on an unknown id."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer(directory)` needs."""

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is not in this tokenizer; its ids go from 0 to {self.vocab_size - 1}")
        return checked


class ByteTokenizer(Tokenizer):
    """One token a byte: ids 0 … 255, and 256 for BOS."""

    vocab_size = 257
    bos_id = 256
    fingerprint = hashlib.sha256(json.dumps(_BYTES_DEFINITION).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        return ids, [1] * len(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in self._checked(ids) if i != self.bos_id).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        _write_json(directory / FILE_NAME, _BYTES_DEFINITION)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`; `bos` names its BOS token, None looks for one with a common name."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos: str | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError("the tokenizer has no tokens; give one that was trained")
        if bos is not None and bos not in vocabulary:
            raise UserError(f"the BOS token {bos!r} is not in the tokenizer's vocabulary of {len(vocabulary)}")
        self._bos = bos or next((name for name in _COMMON_BOS if name in vocabulary), None)
        self.bos_id = None if self._bos is None else vocabulary[self._bos]
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have holes
        definition = json.loads(tokenizer.to_str())
        self._bytes_per_token = _byte_level_lengths(definition, vocabulary)
        self.fingerprint = _fingerprint(definition, self.bos_id)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        return [list(e.ids) for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Exact where tokens are made of bytes. Where a normaliser changes or drops characters, their bytes count
        for the token that stands for them or follows them. A text that vanishes altogether gives no tokens."""
        total = len(_utf8(text))
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = list(encoding.ids)
        if self._bytes_per_token is not None:
            counts = [self._bytes_per_token[i] for i in ids]
            if sum(counts) == total:
                return ids, counts
        return ids, _counts_from_offsets(text, [end for _, end in encoding.offsets])

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(self._checked(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        _write_json(directory / FILE_NAME, json.loads(self._tokenizer.to_str()))
        if self._bos is not None:
            _write_json(directory / "tokenizer_config.json", {"bos_token": self._bos})


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
    definition = _read_json(path)
    if definition.get("format") == _BYTES_DEFINITION["format"]:
        if definition != _BYTES_DEFINITION:
            raise UserError(f"{path} has format version {definition.get('format_version')}; this Longread reads 1")
        return ByteTokenizer()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a Hugging Face tokenizer: {error}") from None
    return HuggingFaceTokenizer(tokenizer, _named_bos(path.parent))


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE with BOS "<|bos|>": the same texts give the same tokenizer, and any text survives a round trip.

    `vocab_size` is an upper limit: a small text has no more merges to offer. `texts` is read once, as a stream.
    """
    if vocab_size < _SMALLEST_BPE:
        raise UserError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least {_SMALLEST_BPE}")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    seen = 0

    def stream() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(_utf8(text))
            yield text

    tokenizer.train_from_iterator(stream(), trainer)
    if not seen:
        raise UserError("there is no text to train a tokenizer on; give at least one text that is not empty")
    return HuggingFaceTokenizer(tokenizer, BOS)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start} of the text is half a surrogate pair; give valid Unicode") from None


def _byte_level_lengths(definition: dict[str, Any], vocabulary: dict[str, int]) -> dict[int, int] | None:
    """Bytes per token id when every character of a token stands for one byte; None for other kinds."""
    if '"ByteLevel"' not in json.dumps(definition.get("decoder")):
        return None
    lengths = {i: len(token) for token, i in vocabulary.items()}
    lengths.update({added["id"]: len(added["content"].encode()) for added in definition.get("added_tokens", ())})
    return lengths


def _counts_from_offsets(text: str, ends: Sequence[int]) -> list[int]:
    """Bytes per token from where each token ends in `text`, in characters.

    Tokens with one end share a character (byte fallback: one byte each), so each after the first counts one byte.
    """
    bytes_before = [0, *accumulate(len(character.encode()) for character in text)]
    reached = [bytes_before[end] for end in accumulate(ends, max)]
    if reached:
        reached[-1] = bytes_before[-1]
    counts: list[int] = []
    start = 0
    for end, run in groupby(reached):
        others = len(list(run)) - 1
        sharing = min(others, end - start)
        counts += [end - start - sharing] + [1] * sharing + [0] * (others - sharing)
        start = end
    return counts


def _fingerprint(definition: dict[str, Any], bos_id: int | None) -> str:
    """Over what decides the ids: not over decoding, padding, or how a version of the library writes its file."""
    model = definition["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    canonical = {
        "type": model.get("type"),
        "vocabulary": model.get("vocab"),
        "merges": merges,
        "added": [[token["id"], token["content"]] for token in definition.get("added_tokens", ())],
        "normalizer": definition.get("normalizer"),
        "pre_tokenizer": definition.get("pre_tokenizer"),
        "bos_id": bos_id,
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def _named_bos(directory: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        token = _read_json(path).get("bos_token") if path.is_file() else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; give a {FILE_NAME} as Hugging Face writes it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; give a {FILE_NAME} as Hugging Face writes it")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
