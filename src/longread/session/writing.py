"""Text that sessions write, as it becomes certain, up to a stop text."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Protocol, Self, TypeVar

from torch import Tensor

from longread.tokenizer import StreamDecoder, Tokenizer


class _Rewindable(Protocol):
    """What is needed of a `Session` here: its file uses this one."""

    @property
    def recent(self) -> list[int]: ...
    def fork(self) -> Self: ...
    def go_back(self, before: Self) -> None: ...
    def read(self, text: Sequence[int]) -> Tensor: ...


_Session = TypeVar("_Session", bound=_Rewindable)


def text_of(
    ids: Generator[int, None, None], tokenizer: Tokenizer, sessions: Sequence[_Session], *, stops: Sequence[str] = ()
) -> Generator[str, None, None]:
    """The text of what `sessions` write together: `ids` of `Session.generate`, none of which has been taken yet.

    However it ends, the sessions have read what was given here and nothing else: no part of a stop text and, where it
    ends early, nothing that was waiting to become a character or a stop text. Whoever could not show the newest piece
    throws the reason in, and that piece has not been given.
    """
    before = [session.fork() for session in sessions]
    decoder = StreamDecoder(tokenizer, before=sessions[0].recent, stops=stops)
    taken: list[int] = []
    ends = [0]  # characters that are certain before each of these and after the last
    given, sound, whole = "", False, False
    try:
        for text in _pieces(ids, decoder, taken, ends):
            given, sound = given + text, True
            try:
                yield text
            except GeneratorExit:
                raise
            except BaseException:
                given = given[: len(given) - len(text)]
                raise
            sound = False
        sound, whole = True, not decoder.stopped
    finally:
        ids.close()
        known = ends.index(max(end for end in ends if end <= len(given)))
        shown = [*taken[:known], *tokenizer.encode_inside(given[ends[known] :])[0]]
        if not whole and not (sound and shown == taken):  # unsound: interrupted in the middle of a token
            for session, begun in zip(sessions, before, strict=True):
                session.go_back(begun)
                session.read(shown)


def _pieces(
    ids: Iterable[int], decoder: StreamDecoder, taken: list[int], ends: list[int]
) -> Generator[str, None, None]:
    """The text as it becomes certain; keeps account of the ids that were taken for it."""
    for token in ids:
        text = decoder.push(token)
        taken.append(token)
        ends.append(decoder.decoded)
        if text:
            yield text
        if decoder.stopped:
            return
    if text := decoder.close():
        yield text
