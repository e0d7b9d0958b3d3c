"""Lanes in which sequences are decoded together: who is in them, what is seen of others, their room, their memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop import Decoder, ReadingState, begin, next_token_logits, read, register_inner_optimizer
from longread.inner_loop.places import SPARE, Places, place_nbytes, room
from longread.inner_loop.step import matrices
from longread.model import Transformer
from tests.tiny import BY_BLOCK, GROUPED, INNER, M, make, text

KINDS = {
    "window": {},
    "full": {"attention": "full"},
    "hybrid": {"attention": "hybrid", "num_blocks": 6},
    "grouped": GROUPED,
    "by block": BY_BLOCK,
}
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def exact(**changes: object) -> Transformer:
    return make(3, torch.float64, **changes)


def after(model: Transformer, n: int, *seeds: int, learn: bool = True) -> ReadingState:
    tokens = torch.tensor([text(n, seed) for seed in seeds or (0,)])
    return read(model, begin(model, len(tokens)), tokens, inner=INNER, learn=learn).state


def assert_same(found: ReadingState, expected: ReadingState) -> None:
    assert found.position == expected.position
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def spoiled(places: Places) -> Places:
    """Places whose memory holds what was there before: nothing of it may be seen."""
    rings = [x for ring in places._rings for x in ring[:2]]
    for x in (*rings, *places._working, places._hidden, places._output, places._logits):
        x.fill_(torch.nan)
    places._read.fill_(17)
    return places


def go_on(model: Transformer, places: Places, states: list[ReadingState], steps: int, *, learn: bool = True) -> None:
    """Reads in all lanes and, each alone, in `states`; both must agree after every token."""
    for step in range(steps):
        tokens = torch.tensor(text(len(states), 90 + step))
        for lane, token in enumerate(tokens):
            if places.due(lane):
                assert places.step(lane, token.view(1), INNER).tolist() == [False]
                assert not places.due(lane)
            states[lane] = read(model, states[lane], token.view(1, 1), inner=INNER, learn=learn).state
        places.read(tokens)
        for lane, state in enumerate(states):
            assert_same(places.take(lane), state)
            logits = next_token_logits(model, state)[0]
            torch.testing.assert_close(places.logits(len(states))[lane], logits, rtol=1e-9, atol=1e-9)


@each_kind
@pytest.mark.parametrize("n", [1, M - 1, M + 1, 3 * M + 2])
def test_what_was_there_before_is_not_seen(changes: dict, n: int) -> None:
    model = exact(**changes)
    places, state = spoiled(Places(model, 2, learn=True)), after(model, n)
    states = [state, after(model, n + M, 1)]
    for lane, one in enumerate(states):
        places.put(lane, one, learn=True)
        assert_same(places.take(lane), one)
    go_on(model, places, states, M)


def two_in(model: Transformer, lanes: int) -> tuple[Places, list[ReadingState]]:
    """Two sequences in the first of so many lanes, after a token."""
    places, states = Places(model, lanes, learn=True), [after(model, 2 * M + 1), after(model, 4 * M + 1, 1)]
    for lane, state in enumerate(states):
        places.put(lane, state, learn=True)
    go_on(model, places, states, 1)
    return places, states


@each_kind
def test_more_lanes_keep_what_is_in_the_first(changes: dict) -> None:
    """Also where nobody is in some of them, and after they have read."""
    model = exact(**changes)
    places, states = two_in(model, 2)
    logits = places.logits(2).clone()
    places.resize(5)
    assert places.lanes == 5
    assert torch.equal(places.logits(5)[:2], logits)
    assert not places.logits(5)[2:].any()
    for lane in (2, 3, 4):
        assert not places.due(lane)
        with pytest.raises(LookupError, match=f"nobody is in lane {lane}"):
            places.take(lane)
    states += [after(model, 3 * M + 2, 2), after(model, 1, 3), after(model, 2 * M, 4)]
    for lane in (2, 3):
        places.put(lane, states[lane], learn=True)
    for lane in range(4):
        assert_same(places.take(lane), states[lane])
    go_on(model, places, states[:4], M)
    places.put(4, states[4], learn=True)
    assert_same(places.take(4), states[4])


@each_kind
def test_fewer_lanes_keep_what_is_in_the_first(changes: dict) -> None:
    model = exact(**changes)
    places, states = two_in(model, 5)
    logits, one = places.logits(2).clone(), places.nbytes // 5
    places.resize(2)
    assert places.lanes == 2
    assert places.nbytes == 2 * one
    assert torch.equal(places.logits(5), logits)
    go_on(model, places, states, M)
    places.resize(3)
    states.append(after(model, 3 * M + 2, 2))
    places.put(2, states[2], learn=True)
    go_on(model, places, states, 1)


def test_an_empty_lane_is_no_reader() -> None:
    """It is not asked for its mini-batch, and costs the others nothing."""
    model = exact()
    places, state = Places(model, 3, learn=True), after(model, M)
    assert [places.due(lane) for lane in range(3)] == [False] * 3
    places.put(1, state, learn=True)
    assert [places.due(lane) for lane in range(3)] == [False, True, False]
    places.leave(1)
    assert not places.due(1)
    with pytest.raises(LookupError, match="nobody is in lane 1"):
        places.take(1)
    places.put(2, state, learn=True)
    places.move(2, 0)
    assert [places.due(lane) for lane in range(3)] == [True, False, False]
    assert_same(places.take(0), state)
    with pytest.raises(LookupError, match="nobody is in lane 2"):
        places.take(2)


@each_kind
def test_a_moved_reader_goes_on(changes: dict) -> None:
    model = exact(**changes)
    places, state = Places(model, 2, learn=True), after(model, 3 * M + 1)
    places.put(1, state, learn=True)
    expected = places.logits(2)[1].clone()
    places.move(1, 0)
    assert torch.equal(places.logits(1)[0], expected)
    go_on(model, places, [state], M)


@pytest.mark.parametrize("n", [1, M, 2 * M + 3])
def test_who_does_not_learn_waits_for_nothing(n: int) -> None:
    """Beside one that learns, in places for both; and where nobody can learn."""
    model = exact()
    frozen = after(model, n, learn=False)
    places = Places(model, 2, learn=True)
    places.put(0, frozen, learn=False)
    places.put(1, after(model, M, 1), learn=True)
    assert [places.due(0), places.due(1)] == [False, True]
    alone = Places(model, 1, learn=False)
    alone.put(0, frozen, learn=True)  # there is no room for a mini-batch
    states = [frozen]
    go_on(model, alone, states, 2 * M, learn=False)
    assert states[0].position == n + 2 * M
    assert alone.nbytes < Places(model, 1, learn=True).nbytes


def test_several_sequences_come_and_go_together() -> None:
    model = exact()
    places, state = Places(model, 4, learn=True), after(model, 2 * M + 3, 0, 1)
    places.put(1, state, learn=True)
    found = places.take(1, 2)
    assert_same(found, state)
    assert all(x.shape[0] == 2 for x in found.tensors)
    before = [x.clone() for x in found.tensors]
    spoiled(places)
    places._counts.fill_(False)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, before, strict=True))  # a value


@pytest.mark.parametrize("n", [M, 3 * M])
def test_several_sequences_step_together(n: int) -> None:
    """In other lanes than the first; a mini-batch begins anew, with all of its targets."""
    model = exact()
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(0)) > 0.4
    tokens = torch.tensor([text(n, seed) for seed in range(2)])
    state = read(model, begin(model, 2), tokens, inner=INNER, loss_mask=mask).state
    places, steps = spoiled(Places(model, 4, learn=True)), 0
    places.put(1, state, learn=True)
    for step in range(2 * M + 1):
        tokens = torch.tensor([[0, 7, step, 0]])
        if places.due(1):
            places.step(1, tokens[0, 1:3], INNER)
            steps += 1
        places.read(tokens[0])
        state = read(model, state, tokens.T[1:3], inner=INNER).state
        assert_same(places.take(1, 2), state)
    assert steps == 3


def too_far(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
    """Steps of which the guard refuses those of the second sequence."""
    odd = torch.arange(len(weights[0])).view(-1, 1, 1) % 2 == 1
    return [torch.where(odd, w + 1e6, w - 0.1 * g) for w, g in zip(weights, gradients, strict=True)]


register_inner_optimizer("too_far", too_far)


@pytest.mark.parametrize("optimizer", ["sgd", "too_far"])
def test_a_refused_step_changes_nothing_but_that_the_mini_batch_is_over(optimizer: str) -> None:
    """Whether the guard sees it by the gradient, or the rule says it itself; of one sequence of two."""
    model, inner = exact(), InnerConfig(optimizer=optimizer, lr=0.7, clip=None)
    state = after(model, M, 0, 1)
    if optimizer == "sgd":
        broken = state.hidden.index_fill(0, torch.tensor([1]), torch.nan)
        state = dataclasses.replace(state, hidden=broken, run=None)
    places, tokens = Places(model, 2, learn=True), torch.tensor([[3], [4]])
    places.put(0, state, learn=True)
    assert places.step(0, tokens[:, 0], inner).tolist() == [False, True]
    places.read(tokens[:, 0])
    stepped = places.take(0, 2)
    assert stepped.hidden.shape[1] == 1
    expected = read(model, state, tokens, inner=inner, guard=True)
    for after_step, before, wanted in zip(*map(matrices, (stepped.fast, state.fast, expected.state.fast)), strict=True):
        torch.testing.assert_close(after_step, wanted, rtol=1e-10, atol=1e-10)
        assert torch.equal(after_step[1], before[1])
        assert not torch.equal(after_step[0], before[0])


@pytest.mark.parametrize("where", ["nowhere", "in the blocks", "in the head"])
def test_a_step_is_taken_back_unless_its_token_is_read(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pass does not come, or fails: so a state has never learned from what it has not read."""

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = exact()
    tokens, mask = torch.tensor([text(2 * M, seed) for seed in range(2)]), torch.arange(2 * M).expand(2, -1) % 3 > 0
    state = read(model, begin(model, 2), tokens, inner=INNER, loss_mask=mask).state
    places, following = spoiled(Places(model, 3, learn=True)), torch.tensor([5, 6])
    places.put(1, state, learn=True)
    places.put(0, after(model, 1), learn=True)
    before = places.take(1, 2)
    places.step(1, following, INNER)
    method = {"in the blocks": "longread.inner_loop.places.decode", "in the head": "longread.model.Transformer.logits"}
    if where in method:
        with monkeypatch.context() as patch:
            patch.setattr(method[where], full)
            with pytest.raises(torch.OutOfMemoryError):
                places.read(torch.tensor([3, 8, 9]))
    found = places.take(1, 2)
    for name in ("hidden", "targets", "targets_mask", "output"):  # of keys the oldest may be gone, which no token sees
        assert torch.equal(getattr(found, name), getattr(before, name))
    assert all(map(torch.equal, matrices(found.fast), matrices(before.fast)))
    assert places.due(1)
    for _ in range(M + 1):
        if places.due(1):
            places.step(1, following, INNER)
        places.read(torch.tensor([3, *following]))
        state = read(model, state, following.unsqueeze(1), inner=INNER).state
        assert_same(places.take(1, 2), state)


def test_masked_targets_wait_as_masked() -> None:
    model = exact()
    mask = torch.tensor([[True, False, True]])
    state = read(model, begin(model), torch.tensor([text(3)]), inner=INNER, loss_mask=mask).state
    places = Places(model, 1, learn=True)
    places.put(0, state, learn=True)
    assert places.take(0).targets_mask.tolist() == [[False, True]]
    places.read(torch.tensor([5]))
    assert places.take(0).targets_mask.tolist() == [[False, True, True]]
    assert places.take(0).targets.tolist() == [[*text(3)[1:], 5]]


def test_room_without_a_window() -> None:
    """More than the position, in steps of 1,024, or about a 48th of what is held; the same however one came there."""
    assert SPARE == 1024
    assert [room(p) for p in (0, 1023, 1024, 2047, 2048)] == [1024, 1024, 2048, 2048, 3072]
    assert [room(p) for p in (65_535, 65_536, 131_071)] == [65_536, 67_584, 133_120 - 2048]
    assert [room(p) for p in (131_072, 200_000, 1 << 20)] == [135_168, 200_704, (1 << 20) + (1 << 15)]


def test_memory_of_a_lane() -> None:
    """By hand: keys and values of 4 blocks, of which only the last looks back beyond a mini-batch, fast weights, a
    mini-batch and one row of hidden states, and logits."""
    model, D, V, float32 = make(), 16, 19, 4
    fast, waiting, logits = 2 * 3 * D * 24, (M + 1) * D, V
    window = 2 * (3 * 6 + (6 + M)) * D
    assert place_nbytes(model, 0) == float32 * (window + fast + waiting + logits)
    assert place_nbytes(make(attention="full"), 1023) == float32 * (2 * 4 * 1024 * D + fast + waiting + logits)
    assert place_nbytes(make(attention="full").to("meta"), 1024) == float32 * (
        2 * 4 * 2048 * D + fast + waiting + logits
    )
    assert Places(model, 3, learn=True).nbytes == 3 * place_nbytes(model, 0)
    frozen = 2 * 4 * 6 * D + fast + D + logits
    assert Places(model, 2, learn=False).nbytes == float32 * 2 * frozen


def ring_sizes(places: Places) -> set[int]:
    return {x.shape[2] for ring in places._rings for x in ring[:2]}


def test_who_has_all_lanes_finds_the_room_of_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives does not depend on who was there before; who shares the lanes finds the largest room."""
    monkeypatch.setattr("longread.inner_loop.places.SPARE", 5)
    model = exact(attention="full")
    places = Places(model, 1, learn=True)
    assert ring_sizes(places) == {5}
    places.put(0, after(model, 13), learn=True)
    assert ring_sizes(places) == {15}
    places.put(0, after(model, 2), learn=True)
    assert ring_sizes(places) == {5}
    shared = Places(model, 2, learn=True)
    long, short = after(model, 13), after(model, 2)
    shared.put(0, long, learn=True)
    shared.put(1, short, learn=True)
    assert ring_sizes(shared) == {15}
    go_on(model, shared, [long, short], M)


def test_a_window_has_the_same_room_at_any_position() -> None:
    model = exact()
    places = Places(model, 1, learn=True)
    pointers = [ring.key.data_ptr() for ring in places._rings]
    places.put(0, after(model, 5 * M + 1), learn=True)
    assert [ring.key.data_ptr() for ring in places._rings] == pointers
    assert ring_sizes(places) == {6, 6 + M}


def test_places_lie_where_their_model_lies() -> None:
    """On the meta device, where a tensor of the CPU among the others would be refused."""
    model = make().to("meta")
    places, state = Places(model, 2, learn=True), begin(model, 2)
    tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
    state = read(model, state, tokens, inner=INNER).state
    places.put(0, state, learn=True)
    places.read(tokens[:, 0])
    own = [x for value in vars(places).values() for x in _tensors(value)]
    assert len(own) > 20
    assert {x.device.type for x in (*own, *places.take(0, 2).tensors)} == {"meta"}


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, list | tuple) else []


def test_places_outlive_no_model() -> None:
    places = Places(make(), 1, learn=True)
    gc.collect()
    with pytest.raises(ReferenceError, match="the model of these places is gone"):
        _ = places.model


@pytest.mark.parametrize("learn", [True, False])
def test_a_decoder_learns_unless_told_otherwise(learn: bool) -> None:
    """What waits when it begins frozen is dropped, with all that belongs to it; steps are counted while it learns."""
    model, state = exact(), after(exact(), M - 1)
    decoder = Decoder(model, state, INNER) if learn else Decoder(model, state, INNER, learn=False)
    begun = decoder.state()
    assert [begun.hidden.shape, begun.targets.shape, begun.targets_mask.shape] == (
        [(1, 3, 16), (1, 2), (1, 2)] if learn else [(1, 0, 16), (1, 0), (1, 0)]
    )
    for token in text(3 * M, 5):
        decoder.read(torch.tensor([token]))
        state = read(model, state, torch.tensor([[token]]), inner=INNER, learn=learn).state
        assert_same(decoder.state(), state)
    assert decoder.steps == (3 if learn else 0)
    assert decoder.rolled_back.dtype == torch.int64
    assert decoder.rolled_back.item() == 0


def test_a_decoder_goes_on_when_its_model_moves() -> None:
    model = exact()
    state = after(model, M + 1)
    decoder = Decoder(model, state, INNER)
    for i, token in enumerate(text(2 * M, 5)):
        if i == 2:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        decoder.read(torch.tensor([token]))
        state = read(model, state, torch.tensor([[token]]), inner=INNER).state
        assert_same(decoder.state(), state)


def test_a_window_of_one_token_and_mini_batches_of_one() -> None:
    model = exact(window_size=1, mini_batch_size=1)
    for learn in (True, False):
        state = after(model, 3, learn=learn)
        decoder = Decoder(model, state, INNER, learn=learn)
        for token in text(4, 5):
            decoder.read(torch.tensor([token]))
            state = read(model, state, torch.tensor([[token]]), inner=INNER, learn=learn).state
            assert_same(decoder.state(), state)
        assert decoder.steps == (4 if learn else 0)


def test_a_decoder_of_one_suffix_block_learns() -> None:
    model = exact(num_suffix_blocks=1)
    decoder = Decoder(model, after(model, M), INNER)
    assert decoder.learn
    decoder.read(torch.tensor([3]))
    assert decoder.steps == 1
    still = Decoder(exact(num_suffix_blocks=0), after(exact(num_suffix_blocks=0), M), INNER)
    assert not still.learn


def test_a_recurrence_learns_by_reading() -> None:
    """Other mixers than attention have no lanes, and are read with the same settings."""
    model = make(mixer="mamba2", num_suffix_blocks=0)
    state = after(model, 3)
    decoder = Decoder(model, state, INNER)
    decoder.read(torch.tensor([3]))
    expected = read(model, state, torch.tensor([[3]]), inner=INNER).state
    for a, b in zip(decoder.state().tensors, expected.tensors, strict=True):
        assert torch.equal(a, b)
