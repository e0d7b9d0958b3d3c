"""The contract of every tokenizer of the library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from longread.config import UserError
from longread.tokenizer.cutting import Cut, Cutter, Stretch


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
