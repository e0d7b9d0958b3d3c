"""Text of ids, token by token: what the sessions have read after every end, by one that writes down what it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import pytest
import torch
from torch import Tensor

from longread.inner_loop import begin
from longread.session import Session, text_of
from longread.tokenizer import ByteTokenizer
from tests import tiny

BYTES = ByteTokenizer()


class Recording:
    """What `text_of` needs of a session: it has read ids and goes back to what it had."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids, self.went_back = list(ids), 0

    @property
    def recent(self) -> list[int]:
        return list(self.ids)

    def fork(self) -> Recording:
        return Recording(self.ids)

    def go_back(self, before: Recording) -> None:
        self.ids, self.went_back = list(before.ids), self.went_back + 1

    def read(self, text: Sequence[int]) -> Tensor:
        self.ids += text
        return torch.zeros(len(text))


class Writing:
    """Ids that a session reads as it gives them, as `Session.generate` does, and how far that went."""

    def __init__(self, session: Recording, ids: Sequence[int], interrupted_at: int | None = None) -> None:
        self.session, self.left, self.interrupted_at = session, list(ids), interrupted_at
        self.ended_with: list[int] | None = None
        self.ids = self._ids()

    def _ids(self) -> Generator[int, None, None]:
        try:
            for i, token in enumerate(self.left):
                self.session.ids.append(token)
                if i == self.interrupted_at:
                    raise KeyboardInterrupt
                yield token
        finally:
            self.ended_with = list(self.session.ids)


def test_a_text_that_ends_by_itself_is_not_read_again() -> None:
    session = Recording()
    assert list(text_of(Writing(session, b"a\xffb").ids, BYTES, [session])) == ["a", "\N{REPLACEMENT CHARACTER}", "b"]
    assert (session.ids, session.went_back) == ([*b"a\xffb"], 0)


def test_a_character_that_was_begun_before_is_ended() -> None:
    session = Recording([*b"x\xc3"])
    assert list(text_of(Writing(session, b"\xa9!").ids, BYTES, [session])) == ["é", "!"]


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_closed_where_nothing_waits_it_keeps_what_it_has(taken: int) -> None:
    session = Recording([*b"x"])
    writing = Writing(session, b"abcd")
    text = text_of(writing.ids, BYTES, [session])
    assert [next(text) for _ in range(taken)] == [*"abcd"[:taken]]
    text.close()
    assert (session.ids, session.went_back) == ([*b"xabcd"[: 1 + taken]], 0)
    assert writing.ended_with == session.ids


@pytest.mark.parametrize(("stops", "shown"), [(["cd"], "ab"), (["b"], "a"), (["abc"], ""), (["dx"], "abcd")])
def test_before_a_stop_nothing_of_it_has_been_read(stops: list[str], shown: str) -> None:
    sessions = [Recording([*b"x"]), Recording([*b"x"])]
    writing = Writing(sessions[0], b"abcd")
    assert "".join(text_of(writing.ids, BYTES, sessions, stops=stops)) == shown
    assert sessions[0].ids == [*b"x", *shown.encode()]
    assert sessions[0].went_back == (shown != "abcd")
    assert sessions[1].ids == (sessions[0].ids if shown != "abcd" else [*b"x"])
    assert writing.ended_with is not None  # whoever writes is told before a session goes back
    assert len(writing.ended_with) >= len(sessions[0].ids)


def test_a_byte_that_is_no_text_stays_the_byte_it_was() -> None:
    """Encoded again, its U+FFFD would be three others."""
    session = Recording()
    text = text_of(Writing(session, b"\xffab??").ids, BYTES, [session], stops=["b???"])
    shown = next(text) + next(text)
    assert shown == "\N{REPLACEMENT CHARACTER}a"
    with contextlib.suppress(StopIteration):
        while True:
            shown += next(text)
    assert shown == "\N{REPLACEMENT CHARACTER}ab??"
    session = Recording()
    text = text_of(Writing(session, b"\xffabc").ids, BYTES, [session], stops=["bc"])
    assert "".join(text) == "\N{REPLACEMENT CHARACTER}a"
    assert session.ids == [*b"\xffa"]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_interrupted_within_a_token_it_has_read_what_was_shown(at: int) -> None:
    """The id that was being read then was never given."""
    session = Recording([*b"x"])
    text = text_of(Writing(session, b"abcd", interrupted_at=at).ids, BYTES, [session])
    assert [next(text) for _ in range(at)] == [*"abcd"[:at]]
    with pytest.raises(KeyboardInterrupt):
        next(text)
    assert (session.ids, session.went_back) == ([*b"xabcd"[: 1 + at]], 1)


def test_a_piece_that_could_not_be_shown_has_not_been_read() -> None:
    session = Recording([*b"x"])
    text = text_of(Writing(session, b"abcd").ids, BYTES, [session])
    next(text), next(text)
    with pytest.raises(BrokenPipeError):
        text.throw(BrokenPipeError())
    assert (session.ids, session.went_back) == ([*b"xa"], 1)


def test_the_ids_are_closed_before_a_session_goes_back() -> None:
    session = Recording()
    writing = Writing(session, b"a\xc3\xa9")
    text = text_of(writing.ids, BYTES, [session], stops=["az"])
    assert writing.ended_with is None
    with contextlib.suppress(StopIteration):
        next(text)
    text.close()
    assert writing.ended_with is not None
    assert writing.ids.gi_frame is None


def test_write_hands_every_setting_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def generate(self: Session, max_tokens: int, **settings: object) -> Generator[int, None, None]:
        asked.append((max_tokens, settings))
        yield from ()

    monkeypatch.setattr(Session, "generate", generate)
    session = Session(tiny.make(vocab_size=257), tiny.INNER, tokenizer=BYTES)
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "repetition_penalty": 1.1, "seed": 4}
    assert not list(session.write("ab", max_tokens=3, **settings))  # type: ignore[arg-type]
    assert not list(session.write("ab"))
    left_alone = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "repetition_penalty": 1.0, "seed": None}
    ends = {"stop_ids": BYTES.beginning}
    assert asked == [(3, settings | ends), (200, left_alone | ends)]


def test_a_new_session_has_taken_no_step() -> None:
    model = tiny.make()
    assert Session(model, tiny.INNER).inner_grad_norms.shape == (0,)
    session = Session.resume(model, tiny.INNER, begin(model))
    assert (session.learn, session.steps, session.rolled_back, session.recent) == (True, 0, 0, [])


def test_a_generator_that_ends_lets_others_have_the_places() -> None:
    from longread.inner_loop.decoding import pool_of

    model = tiny.make()
    session = Session(model, tiny.INNER)
    session.read(tiny.text(6))
    written = session.generate(3, seed=0)
    next(written)
    assert pool_of(model).resting == []
    assert len(list(written)) == 2
    assert len(pool_of(model).resting) == 1
