"""Who has the places in which a model decodes: readers of one model never disturb each other, and memory comes back."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Decoder, ReadingState, begin, decoding, next_token_logits, read
from longread.inner_loop.decoding import KEPT, pool_of
from longread.inner_loop.places import Places
from longread.model import Transformer
from longread.session import Session
from tests.tiny import INNER, M, make, text


def after(model: Transformer, n: int, seed: int = 0, B: int = 1, *, learn: bool = True) -> ReadingState:
    tokens = torch.tensor([text(n, 10 * seed + b) for b in range(B)])
    return read(model, begin(model, B), tokens, inner=INNER, learn=learn).state


def reader(model: Transformer, seed: int = 0, n: int = 9) -> Session:
    session = Session(model, INNER)
    session.read(text(n, seed))
    return session


def greedy(decoder: Decoder, steps: int) -> list[int]:
    found = []
    for _ in range(steps):
        token = decoder.logits().argmax(-1)
        decoder.read(token)
        found.append(int(token[0]))
    return found


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a state was copied into places and out of them."""
    counts = Counter[str]()

    def counted(name: str) -> Callable[..., object]:
        method = getattr(Places, name)

        def called(*args: object, **options: object) -> object:
            counts[name] += 1
            return method(*args, **options)

        return called

    for name in ("put", "take"):
        monkeypatch.setattr(Places, name, counted(name))
    return counts


def test_two_sessions_that_answer_in_turn_copy_nothing(moves: Counter[str]) -> None:
    """Each goes on in places of its own, though it rests in between; a third makes the one that rests longest move."""
    model = make(mini_batch_size=64)
    sessions = [reader(model, seed) for seed in (1, 2)]
    for session in sessions:
        list(session.generate(2, seed=0))
    assert moves == {"put": 2}
    for _ in range(4):
        for session in sessions:
            list(session.generate(3, seed=0))
    assert moves == {"put": 2}
    list(reader(model, 3).generate(2, seed=0))
    assert moves == {"put": 3, "take": 1}
    list(sessions[1].generate(2, seed=0))
    assert moves == {"put": 3, "take": 1}


def test_who_writes_copies_nothing_for_an_inner_step(moves: Counter[str]) -> None:
    model = make()
    states = [after(model, n, seed) for seed, n in enumerate((2 * M, 2 * M + 1, 2 * M + 3))]
    decoder = Decoder(model, states, INNER)
    greedy(decoder, 3 * M)
    assert [text.steps for text in decoder.texts] == [3, 3, 3]
    assert moves == {"put": 3}


LOOKS: dict[str, tuple[Callable[[Session, Path], object], int]] = {
    "position": (lambda session, path: session.position, 0),
    "nbytes": (lambda session, path: session.nbytes, 0),
    "steps": (lambda session, path: (session.steps, session.rolled_back), 0),
    "drift": (lambda session, path: session.drift(), 0),
    "describe": (lambda session, path: session.describe(), 0),
    "repr": (lambda session, path: repr(session), 0),
    "recent": (lambda session, path: (session.recent, session.text), 0),
    "learn": (lambda session, path: setattr(session, "learn", session.learn), 0),
    "state": (lambda session, path: session.state, 1),
    "fork": (lambda session, path: session.fork(), 1),
    "score": (lambda session, path: session.score([1, 2]), 1),
    "save": (lambda session, path: session.save(path / "s"), 1),
}


@functools.cache
def undisturbed() -> tuple[list[int], list[Tensor]]:
    """What a session writes in two goes, and its state afterwards."""
    alone = reader(make(mini_batch_size=64))
    return [*alone.generate(3, seed=4), *alone.generate(4, seed=5)], alone.state.tensors


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("resting", [True, False])
def test_who_looks_at_a_session_ends_nothing(look: str, resting: bool, moves: Counter[str], tmp_path: Path) -> None:
    """It goes on where it is, without a copy back, and keeps no places from others that it did not have before."""
    model = make(mini_batch_size=64)
    session, (expected, state) = reader(model), undisturbed()
    moves.clear()
    written = list(session.generate(3, seed=4))
    generator = session.generate(4, seed=5)
    if not resting:
        written.append(next(generator))
    at_rest = list(pool_of(model).resting)
    assert len(at_rest) == resting
    function, copies = LOOKS[look]
    function(session, tmp_path)
    assert pool_of(model).resting == at_rest
    written += generator
    assert written == expected
    assert moves == Counter(put=1, take=copies)
    for a, b in zip(session.state.tensors, state, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"num_suffix_blocks": 0}], ids=str)
def test_a_session_that_writes_says_what_its_state_is(changes: dict, learn: bool) -> None:
    """At every position: with little in its window and with much, within a mini-batch and at its end."""
    session = Session(make(**changes), INNER, learn=learn)
    session.read([1])
    generator = session.generate(3 * M + 1, seed=0)
    for _ in generator:
        found, state = session.describe(), session.state
        assert session.nbytes == found.nbytes == state.nbytes
        assert (found.position, found.waiting) == (state.position, state.hidden.shape[1])
        assert found.drift == session.fork().drift()
        assert (session.fork().steps, session.fork().rolled_back) == (session.steps, session.rolled_back)


def test_logits_are_values() -> None:
    """Neither its own next token changes them nor another reader of the model."""
    model = make()
    decoders = [Decoder(model, after(model, 9, seed), INNER) for seed in (1, 2)]
    first = decoders[0].logits()
    kept = first.clone()
    second = decoders[1].logits()
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    decoders[0].read(torch.tensor([3]))
    decoders[1].read(torch.tensor([4]))
    assert torch.equal(first, kept)


def test_two_that_write_by_turns_give_what_each_gives_alone() -> None:
    """To the last bit, over several inner steps, one of them frozen for a while."""
    model = make()
    alone = [list(reader(make(), seed).generate(3 * M, seed=seed)) for seed in (1, 2)]
    sessions = [reader(model, seed) for seed in (1, 2)]
    writers = [session.generate(3 * M, seed=seed) for session, seed in zip(sessions, (1, 2), strict=True)]
    assert [list(pair) for pair in zip(*zip(*writers, strict=True), strict=True)] == alone
    other = reader(make(), 2)
    list(other.generate(3 * M, seed=2))
    for a, b in zip(sessions[1].state.tensors, other.state.tensors, strict=True):
        assert torch.equal(a, b)


def test_who_works_has_places_of_its_own_and_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    decoders = [Decoder(model, after(model, 9, seed), INNER) for seed in (1, 2, 3)]
    for decoder in decoders:
        decoder.logits()
    moves: list[str] = []
    for name in ("put", "take"):
        monkeypatch.setattr(Places, name, lambda *a, name=name, **k: moves.append(name))
    for decoder in (*decoders, *decoders):
        decoder.logits()
        decoder.read(torch.tensor([1]))
    assert moves == []
    decoders[0].rest()
    decoders[0].logits()  # back before anybody else came
    assert moves == []


def test_who_rests_moves_out_for_others_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "KEPT", 1)
    model = make(3, torch.float64)
    resting, state = Decoder(model, after(model, 6, 1), INNER), after(model, 6, 1)
    resting.read(torch.tensor([7]))
    state = read(model, state, torch.tensor([[7]]), inner=INNER).state
    resting.rest()
    (places,) = pool_of(model).resting
    other = Decoder(model, after(model, 9, 2), INNER)
    other.read(torch.tensor([1]))
    assert pool_of(model).resting == []
    assert other._pooled is places  # not made anew
    torch.testing.assert_close(resting.logits(), next_token_logits(model, state), rtol=1e-10, atol=1e-10)
    for token in text(2 * M, 4):
        resting.read(torch.tensor([token]))
        state = read(model, state, torch.tensor([[token]]), inner=INNER).state
        for a, b in zip(resting.state().tensors, state.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_few_places_rest() -> None:
    """However many sessions have written, and whoever is forgotten while it writes."""
    model = make()
    sessions = [reader(model, seed) for seed in range(4)]
    for session in sessions:
        list(session.generate(2, seed=0))
    assert len(pool_of(model).resting) == KEPT
    for B in (2, 3, 4):
        decoder = Decoder(model, after(model, 5, B=B), INNER)
        decoder.logits()
        decoder.rest()
    assert len(pool_of(model).resting) == KEPT
    at_rest = [pooled.places for pooled in pool_of(model).resting]
    writer = sessions[0].generate(5, seed=0)
    next(writer)
    assert len(pool_of(model).resting) == KEPT  # of other lanes; it writes in new ones
    del writer
    gc.collect()
    assert pool_of(model).resting[-1].places not in at_rest  # a generator that is closed rests
    lost = Decoder(model, after(model, 5), INNER)
    lost.logits()
    gone = weakref.ref(lost._pooled.places)  # type: ignore[union-attr]
    del lost
    gc.collect()
    assert gone() is None


def test_places_without_a_text_are_used_again() -> None:
    """Whether who wrote there is gone or has moved out."""
    model, found = make(), []
    for seed in range(3):
        decoder = Decoder(model, after(model, 9, seed), INNER)
        decoder.logits()
        decoder.rest()
        if seed == 1:
            decoder.end()
        del decoder
        found += [pooled.places for pooled in pool_of(model).resting]
    assert len(found) == 3
    assert all(places is found[0] for places in found)


def test_places_that_are_given_up_leave_their_texts_with_whoever_rested_there() -> None:
    """The oldest of more than are kept: those of one lane, once those of two and of three rest too."""
    model = make(3, torch.float64)
    states = [after(model, 6, B, B=B) for B in (1, 2, 3)]
    decoders = [Decoder(model, state, INNER) for state in states]
    for B, decoder in enumerate(decoders, start=1):
        decoder.read(torch.full((B,), 7))
        decoder.rest()
    assert [pooled.places.lanes for pooled in pool_of(model).resting] == [2, 3]
    assert [decoder.texts[0].state is None for decoder in decoders] == [False, True, True]
    for B, (decoder, state) in enumerate(zip(decoders, states, strict=True), start=1):
        expected = read(model, state, torch.full((B, 1), 7), inner=INNER).state
        torch.testing.assert_close(decoder.logits(), next_token_logits(model, expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resting", [True, False])
def test_a_model_whose_weights_are_elsewhere_has_other_places(resting: bool) -> None:
    """The texts move there from the old ones, whether or not anybody works in them."""
    model = make(3, torch.float64)
    decoder, state = Decoder(model, after(model, 6), INNER), after(model, 6)
    decoder.read(torch.tensor([7]))
    state = read(model, state, torch.tensor([[7]]), inner=INNER).state
    assert decoder._pooled is not None
    before = decoder._pooled
    if resting:
        decoder.rest()
    model.embedding.weight.data = model.embedding.weight.data.clone()
    torch.testing.assert_close(decoder.logits(), next_token_logits(model, state), rtol=1e-10, atol=1e-10)
    assert decoder._pooled is not None
    assert decoder._pooled.places is not before.places
    assert before not in pool_of(model).resting
    for a, b in zip(decoder.state().tensors, state.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_all_texts_come_out_where_one_has_left() -> None:
    model = make(3, torch.float64)
    states = [after(model, 6, seed) for seed in (1, 2)]
    decoder = Decoder(model, states, INNER)
    decoder.leave(0)
    decoder.read(torch.tensor([3, 7]))
    gone_on = read(model, states[1], torch.tensor([[7]]), inner=INNER).state
    for found, expected in zip(decoder.end(), (states[0], gone_on), strict=True):
        for a, b in zip(found.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_session_that_was_moved_out_is_what_it_was() -> None:
    model = make()
    sessions, alone = [reader(model, seed) for seed in range(3)], [reader(make(), seed) for seed in range(3)]
    for _ in range(3):
        for session, other in zip(sessions, alone, strict=True):
            assert list(session.generate(3, seed=1)) == list(other.generate(3, seed=1))
    for session, other in zip(sessions, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(session.state.tensors, other.state.tensors, strict=True))
        assert (session.position, session.steps) == (other.position, other.steps) == (18, 4)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"mixer": "mamba2", "num_suffix_blocks": 0}], ids=str)
def test_texts_at_their_own_positions_go_on_together(changes: dict, learn: bool) -> None:
    """Each as if it were alone: its logits, its state, its steps; who takes a step holds nobody up."""
    model = make(3, torch.float64, **changes)
    lengths = (1, M, M + 1, 2 * M, 3 * M + 2, 2 * M)
    states = [after(model, n, seed, learn=learn) for seed, n in enumerate(lengths)]
    decoder = Decoder(model, states, INNER, learn=learn)
    alone = [Decoder(model, state, INNER, learn=learn) for state in states]
    for step in range(2 * M + 1):
        expected = torch.cat([one.logits() for one in alone])
        torch.testing.assert_close(decoder.logits(), expected, rtol=1e-9, atol=1e-9)
        tokens = torch.tensor(text(len(states), 50 + step))
        decoder.read(tokens)
        for one, token in zip(alone, tokens, strict=True):
            one.read(token[None])
    for row, one, state in zip(decoder.texts, alone, decoder.states(), strict=True):
        assert (row.position, row.steps, int(row.rolled_back)) == (one.position, one.steps, int(one.rolled_back))
        for a, b in zip(state.tensors, one.state().tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"mixer": "mamba2", "num_suffix_blocks": 0}], ids=str)
def test_a_text_that_has_left_stays_as_it_is(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """And may do so from the beginning; the others go on, also when they had to move out meanwhile."""
    monkeypatch.setattr(decoding, "KEPT", 1)
    model = make(3, torch.float64, **changes)
    states = [after(model, n, seed) for seed, n in enumerate((M, 6, 2 * M + 1))]
    decoder, alone = Decoder(model, states, INNER), Decoder(model, states[1], INNER)
    decoder.leave(0)
    for step in range(M + 2):
        tokens = torch.tensor([0, 5 + step, 2])
        decoder.read(tokens)
        alone.read(tokens[1:2])
        if step == 2:
            decoder.leave(2)
            decoder.leave(2)
            decoder.rest()
            Decoder(model, states, INNER).logits()
    expected = [next_token_logits(model, state) for state in decoder.states()]
    torch.testing.assert_close(decoder.logits(), torch.cat(expected), rtol=1e-9, atol=1e-9)
    assert [one.position for one in decoder.texts] == [M, 8 + M, 2 * M + 4]
    for a, b in zip(decoder.states()[0].tensors, states[0].tensors, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(decoder.states()[1].tensors, alone.state().tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for one in (0, 1):
        decoder.leave(one)
    decoder.read(torch.tensor([1, 1, 1]))  # nobody does
    assert [state.position for state in decoder.end()] == [M, 8 + M, 2 * M + 4]
    if model.config.mixer == "attention":
        assert pool_of(model).resting[-1].resting() is None


@functools.cache
def written_alone(seed: int) -> list[int]:
    session = reader(make(), seed)
    return [token for _ in range(4) for token in session.generate(M, seed=seed)]


@pytest.mark.parametrize("kept", [1, KEPT])
def test_threads_write_with_one_model(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "KEPT", kept)

    def write(seed: int) -> list[int]:
        session, written = sessions[seed], []
        for _ in range(4):
            written += list(session.generate(M, seed=seed))
        return written

    expected, model = [written_alone(seed) for seed in range(4)], make()
    sessions = [reader(model, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == expected


def tensors_of(decoder: Decoder) -> list[Tensor]:
    return decoder.state().tensors


@pytest.mark.parametrize("where", ["finish", "decode"])
def test_an_interrupted_step_leaves_the_text_before_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the token after it has not been read."""
    model = make(3, torch.float64)
    decoder = Decoder(model, [after(model, M), after(model, M + 2, 1)], INNER)
    before = [x.clone() for x in tensors_of(decoder)]

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"longread.inner_loop.places.{where}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(torch.tensor([1, 2]))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(decoder), before, strict=True))
    assert [one.position for one in decoder.texts] == [M, M + 2]
    assert decoder.steps == 0
    assert greedy(decoder, 3) == greedy(Decoder(model, after(model, M), INNER), 3)
