"""Text that sessions write, as it becomes certain, up to a stop text."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from longread.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from longread.session.session import Session


def text_of(
    ids: Generator[int, None, None], tokenizer: Tokenizer, sessions: Sequence[Session], *, stops: Sequence[str] = ()
) -> Generator[str, None, None]:
    """The text of what `sessions` write together: `ids` of `Session.generate`, none of which has been taken yet.

    After a stop text the sessions have read what was given here, and nothing of the stop text. In any other case, this
    closed early included, they have read all ids that were taken.
    """
    before = [session.fork() for session in sessions] if stops else []
    decoder = StreamDecoder(tokenizer, before=sessions[0].recent, stops=stops)
    taken: list[int] = []
    ends = [0]  # characters that are certain before each of these and after the last
    given = ""
    try:
        for token in ids:
            text = decoder.push(token)
            taken.append(token)
            ends.append(decoder.decoded)
            given += text
            if text:
                yield text
            if decoder.stopped:
                break
        if text := decoder.close():
            yield text
    finally:
        ids.close()
    if decoder.stopped:
        whole = ends.index(max(end for end in ends if end <= len(given)))
        shown = [*taken[:whole], *tokenizer.encode_inside(given[ends[whole] :])[0]]
        for session, begun in zip(sessions, before, strict=True):
            session.go_back(begun)
            session.read(shown)
