"""What a session says about itself, how one goes on from a state, and which numbers of a file are refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longread.config import UserError
from longread.inner_loop import ReadingState, begin, drift, read
from longread.inner_loop.step import from_matrices, matrices
from longread.model import Transformer
from longread.session import Session
from longread.session.storage import check_layout, packed, unpacked
from tests.tiny import INNER, M, make, text

CPU = torch.device("cpu")


def state_of(model: Transformer, n: int) -> ReadingState:
    return read(model, begin(model), torch.tensor([text(n)]), inner=INNER).state


def test_a_session_begins_with_nothing() -> None:
    session = Session(make(), INNER)
    assert session.inner_grad_norms.shape == (0,)
    assert (session.position, session.steps, session.rolled_back, session.recent) == (0, 0, 0, [])
    assert (session.learn, session.drift()) == (True, 0.0)


def test_drift_is_the_way_gone_as_a_share_of_the_beginning() -> None:
    model = make()
    session = Session(model, INNER)
    session.read(text(5 * M + 1))
    pairs = [*zip(matrices(session.state.fast), matrices(model.initial_fast_weights(1)), strict=True)]
    moved = sum((w - w0).double().square().sum().item() for w, w0 in pairs) ** 0.5
    initial = sum(w0.double().square().sum().item() for _, w0 in pairs) ** 0.5
    assert moved > 0.01
    assert session.drift() == pytest.approx(moved / initial, rel=1e-5)
    assert type(session.rolled_back) is int


def test_drift_of_each_sequence() -> None:
    model = make(3, torch.float64)
    initial = matrices(model.initial_fast_weights(2))
    moved = [w + (i + 1) * torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None] for i, w in enumerate(initial)]
    distance = sum((i + 1) ** 2 * w[0].numel() for i, w in enumerate(initial)) ** 0.5
    size = sum(w[0].square().sum().item() for w in initial) ** 0.5
    torch.testing.assert_close(drift(model, from_matrices(moved)), torch.tensor([0, distance / size]).double())


def test_drift_from_zero_is_absolute() -> None:
    model = make(3, torch.float64).requires_grad_(False)
    for w in matrices(model.initial_fast_weights(1)):
        w.zero_()
    moved = [torch.full((2, *w.shape[1:]), 0.5).double() for w in matrices(model.initial_fast_weights(1))]
    moved[0][0] = math.nan
    expected = 0.5 * sum(w[0].numel() for w in moved) ** 0.5
    assert drift(model, from_matrices(moved)).isnan().tolist() == [True, False]
    assert drift(model, from_matrices(moved))[1].item() == pytest.approx(expected)
    session = Session(model, INNER)
    session.read(text(5 * M + 1))  # nothing can be learned, as every gradient is 0
    assert (session.steps, session.rolled_back, session.drift()) == (5, 0, 0.0)


def test_learning_begins_from_a_down_projection_of_zeros() -> None:
    """As a pretrained model gets it, so that it begins as it was."""
    model = make().requires_grad_(False)
    for block in model.suffix:
        block.fast_mlp.down.weight.zero_()
    session = Session(model, INNER)
    session.read(text(5 * M + 1))
    assert (session.steps, session.rolled_back) == (5, 0)
    assert 0 < session.drift() < 1
    assert all(block.down.any() for block in session.state.fast)


def test_a_session_goes_on_from_a_state(tmp_path: Path) -> None:
    model = make()
    state = state_of(model, 2 * M + 1)
    plain = Session.resume(model, INNER, state)
    assert (plain.learn, plain.steps, plain.rolled_back, plain.recent) == (True, 0, 0, [])
    given = Session.resume(
        model, INNER, state, learn=False, recent=text(9)[-6:], steps=3, rolled_back=2, fingerprint="f" * 64
    )
    assert (given.learn, given.steps, given.rolled_back) == (False, 3, 2)
    assert (given.position, given.recent) == (2 * M + 1, text(9)[-6:])
    given.save(tmp_path / "session.safetensors")
    with pytest.raises(UserError, match="belongs to another model"):  # the fingerprint is taken as it is given
        Session.restore(tmp_path / "session.safetensors", model)
    restored = Session.restore(tmp_path / "session.safetensors", model, fingerprint="f" * 64)
    assert (restored.learn, restored.steps, restored.rolled_back) == (False, 3, 2)


def test_a_session_can_begin_on_another_device(tmp_path: Path) -> None:
    model, session = make(), Session(make(), INNER)
    session.read(text(9))
    session.save(tmp_path / "session.safetensors", storage="delta")
    elsewhere = Session.restore(tmp_path / "session.safetensors", model, device=torch.device("meta"))
    assert {x.device.type for x in elsewhere.state.tensors} == {"meta"}
    here = Session.restore(tmp_path / "session.safetensors", model)
    assert {x.device.type for x in here.state.tensors} == {"cpu"}
    assert not any(x.requires_grad for x in here.state.tensors)


def kept(model: Transformer, n: int = 3) -> tuple[ReadingState, dict[str, Tensor]]:
    state = state_of(model, n)
    return state, packed(state, text(n)[-6:], model, "exact")


@pytest.mark.parametrize("name", ["recent", "targets"])
@pytest.mark.parametrize("wrong", [[0, 19], [19, 0], [-1, 18], [18, -1], [19, 19], [2**62, 3]], ids=str)
def test_tokens_beyond_the_vocabulary_are_refused(name: str, wrong: list[int]) -> None:
    model = make()
    state, tensors = kept(model)
    tensors[name] = torch.tensor(wrong if name == "recent" else [wrong])
    with pytest.raises(UserError, match=f"its {name} are not in the vocabulary of 19"):
        unpacked("a file", tensors, model, state.position, "exact", CPU)


def test_the_first_and_the_last_token_of_the_vocabulary_are_in_it() -> None:
    model = make()
    state, tensors = kept(model)
    tensors |= {"recent": torch.tensor([0, 18, 0]), "targets": torch.tensor([[18, 0]])}
    found, recent = unpacked("a file", tensors, model, state.position, "exact", CPU)
    assert (found.targets.tolist(), recent) == ([[18, 0]], [0, 18, 0])


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
    return {name: (kinds[x.dtype], tuple(x.shape)) for name, x in tensors.items()}


def test_no_more_tokens_wait_than_a_mini_batch_has() -> None:
    """Although everything else fits: more tokens than M at a late position, or more than have been read."""
    longer = make(mini_batch_size=8)
    state, tensors = kept(longer, 6)
    assert state.hidden.shape[1] == 6
    check_layout("a file", layout(tensors), longer, 6)
    with pytest.raises(UserError, match="6 tokens wait in it; a mini-batch has 4"):
        check_layout("a file", layout(tensors), make(), 6)
    with pytest.raises(UserError, match="6 tokens wait in it"):
        check_layout("a file", layout(tensors), longer, 5)
    check_layout("a file", layout(kept(make(), 2 * M)[1]), make(), 2 * M)


@pytest.mark.parametrize("name", ["hidden", "output", "fast.0", "lower.0.key", "recent"])
def test_a_file_says_what_it_lacks(name: str) -> None:
    model = make()
    present = layout(packed(begin(model), [], model, "exact"))
    check_layout("a file", present, model, 0)
    del present[name]
    with pytest.raises(UserError, match=f"it has no '{name}'"):
        check_layout("a file", present, model, 0)


def test_a_delta_is_what_reading_has_added() -> None:
    model = make()
    state = state_of(model, 2 * M + 1)
    tensors = packed(state, [], model, "delta")
    expected = matrices(state.fast)[0] - matrices(model.initial_fast_weights(1))[0].detach()
    assert torch.equal(tensors["fast.0"], expected.bfloat16())
    assert not any(x.requires_grad for x in tensors.values())
    broken = dataclasses.replace(state, output=state.output * torch.inf)
    with pytest.raises(UserError, match="the session's output holds numbers that are not finite"):
        packed(broken, [], model, "delta")
