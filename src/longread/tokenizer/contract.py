"""The contract of every tokenizer of the library, and texts that arrive in pieces: they are cut where no token is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from longread.config import UserError

BLOCK = 1 << 16
"""Characters taken at a time out of a longer piece."""
LEAST = 256
"""Characters that must be new before a stream looks for a place to cut."""


class Cut(NamedTuple):
    """A place in a text where one token ends and another begins, whatever stands before the text and comes after it."""

    end: int
    """The place, in characters."""
    start: int
    """Where a context begins: the tokens after `end` are those of the text from here on, without the first ones."""
    ids: list[int]
    """The tokens of the text between `start` and `end`."""
    settled: int
    """So many of the last `ids` are the same whatever stands before `start`."""


class Stretch(NamedTuple):
    """A part of a text that is cut where no token is."""

    context: str
    """The text before it, as far as it matters."""
    before: list[int]
    """The tokens of the context."""
    text: str
    settled: list[int]
    """The last tokens of context and text, as they were found when the place was chosen."""

    def own(self, ids: list[int]) -> list[int]:
        """The tokens of the text alone, from those of context and text. Raises `UserError` if they do not fit."""
        known, last = self.before, self.settled
        if ids[: len(known)] != known or ids[len(ids) - len(last) :] != last:
            raise UserError(
                "this tokenizer's tokens depend on text far away, so a long text cannot be cut for it; "
                "give shorter texts or another tokenizer"
            )
        return ids[len(known) :]


class Cutter:
    """Cuts a text that arrives in pieces into stretches of about `least` characters.

    `last_cut` is a tokenizer's. Where it leaves no place to cut (a run of one letter, a tokenizer without words), the
    stretch grows until there is one, at worst to the whole text.
    """

    def __init__(self, last_cut: Callable[[str, int], Cut | None], least: int) -> None:
        self._last_cut, self._least = last_cut, least
        self._context, self._before = "", list[int]()
        self._waiting: list[str] = []
        self._length, self._enough = 0, least

    def push(self, text: str) -> Iterator[Stretch]:
        """Stretches that are certain, now that `text` is there."""
        for begin in range(0, len(text), BLOCK):
            piece = text[begin : begin + BLOCK]
            self._waiting.append(piece)
            self._length += len(piece)
            if self._length >= self._enough:
                yield from self._cut()

    def close(self) -> Iterator[Stretch]:
        """The rest: nothing comes any more."""
        if self._length:
            yield Stretch(self._context, self._before, "".join(self._waiting), [])
        self._context, self._before, self._waiting, self._length = "", [], [], 0

    def _cut(self) -> Iterator[Stretch]:
        known, rest = len(self._context), "".join(self._waiting)
        text = self._context + rest
        cut = self._last_cut(text, known)
        if cut is None:
            self._waiting, self._enough = [rest], 2 * self._length  # not again and again over the same text
            return
        settled = cut.ids[len(cut.ids) - cut.settled :]
        yield Stretch(self._context, self._before, text[known : cut.end], settled)
        self._context, self._before = text[cut.start : cut.end], cut.ids
        self._waiting, self._length = [text[cut.end :]], len(text) - cut.end
        self._enough = self._length + self._least


class Tokenizer(ABC):
    """Ids lie in [0, vocab_size). `fingerprint` is the SHA-256 of what defines the mapping, the BOS included."""

    vocab_size: int
    bos_id: int | None
    fingerprint: str

    @property
    def beginning(self) -> list[int]:
        """The ids before those of a text, where a document starts: BOS, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether a file that carries `fingerprint` was made with this tokenizer; earlier versions wrote others."""
        return fingerprint == self.fingerprint

    @abstractmethod
    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the UTF-8 bytes of `text` that each of them covers; these sum to `len(text.encode())`."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS. Raises `UserError` on a text that is not valid Unicode."""

    def encode_inside(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_with_bytes`, of a text that goes on from another: without the space or mark that SentencePiece
        puts before a text, and others before its first word."""
        for before in ("\n", "."):  # a token reaches across if the text has more of the same
            head, sizes = self.encode_with_bytes(before)
            ids, lengths = self.encode_with_bytes(before + text)
            if sum(sizes) == sum(lengths[: len(head)]) == len(before) and ids[: len(head)] == head:
                return ids[len(head) :], lengths[len(head) :]
        return self.encode_with_bytes(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; some tokenizers work on many at once."""
        return [self.encode(text) for text in texts]

    def cut(self, pieces: Iterable[str], least: int) -> Iterator[Stretch]:
        """A text that comes in pieces, in stretches of about `least` characters, to be given to `encode_cut`."""
        cutter = Cutter(self.last_cut, least)
        for piece in pieces:
            yield from cutter.push(piece)
        yield from cutter.close()

    def encode_cut(self, stretches: Sequence[Stretch]) -> list[list[int]]:
        """The ids of each stretch: those of a text that was cut make up the ids of that text."""
        found = self.encode_batch([stretch.context + stretch.text for stretch in stretches])
        return [stretch.own(ids) for stretch, ids in zip(stretches, found, strict=True)]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS is dropped, invalid UTF-8 becomes U+FFFD. Raises `UserError` on an unknown id."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer(directory)` needs."""

    def last_cut(self, text: str, known: int) -> Cut | None:
        """The last place behind the first `known` characters where `text` can be cut; None if no place is certain.

        `text` may go on. It begins where a text begins, or at the `start` of an earlier cut.
        """
        return None

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of `token`, wherever it stands; None where its text depends on its neighbours."""
        return None

    def decoding_probes(self) -> list[int]:
        """Tokens of which one shows, put behind others, whether a token that comes can change the text of those."""
        return []

    def joins_bytes(self, token: int) -> bool:
        """Whether `token` is one byte, and makes characters only together with all such tokens beside it."""
        return False

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is not in this tokenizer; its ids go from 0 to {self.vocab_size - 1}")
        return checked


def utf8(text: str) -> bytes:
    """The bytes of `text`. Raises `UserError` on half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start} of the text is half a surrogate pair; give valid Unicode") from None


class StreamEncoder:
    """Ids and byte lengths of a text in pieces, as soon as no later piece can change them.

    All that `push` and `close` give, in order, is `tokenizer.encode_with_bytes` of the whole text. About 300 characters
    wait for what follows; more where the tokenizer leaves no place to cut (`Cutter`).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cutter = Cutter(tokenizer.last_cut, LEAST)

    def push(self, text: str) -> tuple[list[int], list[int]]:
        """The next piece. Raises `UserError` on half a surrogate pair."""
        utf8(text)
        return self._encoded(self._cutter.push(text))

    def close(self) -> tuple[list[int], list[int]]:
        """The rest of the tokens, when no more text comes."""
        return self._encoded(self._cutter.close())

    def _encoded(self, stretches: Iterator[Stretch]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        lengths: list[int] = []
        for stretch in stretches:
            found, covered = self._tokenizer.encode_with_bytes(stretch.context + stretch.text)
            ids += stretch.own(found)
            lengths += covered[len(stretch.before) :]
        return ids, lengths
