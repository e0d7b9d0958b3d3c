"""States that become one batch and come apart again: positions, devices, and the memory they hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longread.inner_loop import ReadingState, begin, read
from longread.inner_loop.state import apart, compact, moved_to, shapes_of, together
from longread.model import Transformer
from tests.tiny import INNER, M, make, text


def after(model: Transformer, n: int, seeds: tuple[int, ...] = (0,)) -> ReadingState:
    tokens = torch.tensor([text(n, seed) for seed in seeds], device=model.device)
    return read(model, begin(model, len(seeds)), tokens, inner=INNER).state


def test_a_batch_knows_where_each_of_its_texts_is() -> None:
    """Also of batches: the positions of what is one already are kept, and one for all of it counts for each."""
    model = make()
    one, two, other = after(model, 3 * M + 1), after(model, 4 * M + 1, (1, 2)), after(model, 5 * M + 1)
    batch = together([together([one, other]), two])
    assert batch.position == 3 * M + 1
    assert batch.positions is not None
    assert batch.positions.tolist() == [3 * M + 1, 5 * M + 1, 4 * M + 1, 4 * M + 1]
    assert together([other, one]).position == 5 * M + 1
    assert together([one]) is one
    parts = apart(batch)
    assert [part.position for part in parts] == [3 * M + 1, 5 * M + 1, 4 * M + 1, 4 * M + 1]
    assert [part.positions for part in parts] == [None] * 4
    for part, whole in zip(parts[2].tensors, two.tensors, strict=True):
        assert torch.equal(part, whole[:1])


def test_a_batch_at_one_position_comes_apart() -> None:
    state = after(make(), 2 * M + 3, (0, 1, 2))
    assert state.positions is None
    assert [part.position for part in apart(state)] == [2 * M + 3] * 3


@pytest.mark.parametrize("n", [1, M, M + 1])
def test_what_is_read_together_moves_every_position_forward(n: int) -> None:
    model = make()
    batch = together([after(model, 3 * M + 1), after(model, 5 * M + 1)])
    found = read(model, batch, torch.tensor([text(n, 7), text(n, 8)]), inner=INNER).state
    assert found.position == 3 * M + 1 + n
    assert found.positions is not None
    assert found.positions.tolist() == [3 * M + 1 + n, 5 * M + 1 + n]


def test_only_equal_shapes_and_types_are_one_batch() -> None:
    model = make()
    assert shapes_of(after(model, 3 * M + 1)) == shapes_of(after(model, 6 * M + 1, (1, 2)))
    assert shapes_of(after(model, 3 * M + 1)) != shapes_of(after(model, 3 * M + 2))
    assert shapes_of(after(model, 3 * M + 1)) != shapes_of(after(make(dtype=torch.float64), 3 * M + 1))


def test_a_state_holds_no_more_memory_than_it_says() -> None:
    """What is part of a larger tensor is copied out of it, and nothing else is."""
    state = after(make(), M + 2)
    whole = torch.cat([state.output, state.output], dim=1)
    kept = compact(dataclasses.replace(state, output=whole[:, : state.output.shape[1]]))
    assert kept.output.untyped_storage().nbytes() == kept.output.nbytes == state.output.nbytes
    assert torch.equal(kept.output, state.output)
    own = compact(kept)
    assert own.output.data_ptr() == kept.output.data_ptr()
    (alone,) = apart(dataclasses.replace(state, output=whole[:, : state.output.shape[1]]))
    assert alone.output.untyped_storage().nbytes() == state.output.nbytes


def test_a_batch_lies_where_its_states_lie() -> None:
    """Without numbers, on the meta device: nothing is left behind on the CPU."""
    model = make().to("meta")
    states = [moved_to(after(make(), n), torch.device("meta")) for n in (3 * M + 1, 5 * M + 1)]
    batch = together(states)
    assert {x.device.type for x in (*batch.tensors, batch.positions) if x is not None} == {"meta"}
    assert {x.device.type for x in begin(model).tensors} == {"meta"}
    assert {x.device.type for x in states[0].tensors} == {"meta"}


def test_only_a_copy_goes_without_the_run_of_a_full_mini_batch() -> None:
    model = make(3)
    full = [read(model, begin(model), torch.tensor([text(M, seed)]), inner=INNER).state for seed in (0, 1)]
    assert apart(full[0])[0].run is full[0].run is not None
    assert together(full[:1]).run is full[0].run
    assert together(full).run is None
    assert [state.run for state in apart(together(full))] == [None, None]
    assert moved_to(full[0], torch.device("cpu")).run is None
