"""Reading with tokens kept as CUDA graphs reads as without; on a CPU with graphs that stand in for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Reading, ReadingState, begin, captured_kept, kept as kept_module, read
from longread.inner_loop.graphs import GraphRefused
from longread.inner_loop.state import apart, together
from longread.model import Transformer
from tests.fake_graphs import FakeGraph, fake_graphs, set_capturing
from tests.tiny import GROUPED, INNER, M, make, text

__all__ = ["fake_graphs"]
W, N = 8, 6
T = 11 * M + 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        request.getfixturevalue("fake_graphs")
    monkeypatch.setattr(kept_module, "MOST", 3.1)  # else what these models read would be all alike
    return request.param


@pytest.fixture
def replays(device: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Of the graphs that are captured."""
    found, real = list[object](), torch.cuda.CUDAGraph.replay

    def replay(graph: object) -> None:
        found.append(graph)
        real(graph)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return found


def model_on(device: str, **changes: object) -> Transformer:
    wide = {"width": 32, "mlp_hidden": 32} if device == "cuda" else {}
    kept = {"window_size": W, "kept_tokens": N, "kept_run": 3}
    model = make(3, torch.float64, **(kept | wide | changes))
    return model.float().cuda() if device == "cuda" else model


def ids(device: str, *seeds: int, n: int = T) -> Tensor:
    return torch.tensor([text(n, seed) for seed in seeds], device=device)


def in_pieces(
    model: Transformer, state: ReadingState, tokens: Tensor, pieces: Sequence[int], **options: bool
) -> Reading:
    """Of all of it: losses, norms and refusals together, and the last state."""
    found = []
    for part in tokens.split(list(pieces), 1):
        found.append(read(model, state, part, inner=INNER, **options))
        state = found[-1].state
    names = "nll", "inner_grad_norm", "rolled_back"
    return found[-1]._replace(**{name: torch.cat([getattr(one, name) for one in found], 1) for name in names})


def assert_alike(found: Reading, expected: Reading, device: str) -> None:
    close = {"rtol": 1e-9, "atol": 1e-11} if device == "cpu" else {"rtol": 1e-3, "atol": 5e-3}
    assert found.state.position == expected.state.position
    pairs = zip(
        (*found.state.tensors, found.nll, found.inner_grad_norm),
        (*expected.state.tensors, expected.nll, expected.inner_grad_norm),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, equal_nan=True, **close)
    assert torch.equal(found.rolled_back, expected.rolled_back)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, GROUPED, {"window_size": 7}, {"kept_distance": 2 * T}, {"num_suffix_blocks": 0}]
)
def test_it_reads_as_without_graphs(
    changes: dict[str, object], learn: bool, device: str, replays: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = model_on(device, **changes), ids(device, 1, 2)
    with pytest.MonkeyPatch.context() as plain:
        set_capturing(plain, on=False)
        expected = in_pieces(model, begin(model, 2), tokens, [T], learn=learn)
    for worth, pieces in (
        (3, [T]),
        (1, [T]),
        (1, [5, 5 * M, 2 * M + 1, 1, T - 7 * M - 7]),
        (1, [6 * M, 2 * M, T - 8 * M]),
    ):
        monkeypatch.setattr(captured_kept, "WORTH", worth)
        before = len(replays)
        assert_alike(in_pieces(model, begin(model, 2), tokens, pieces, learn=learn), expected, device)
        assert len(replays) - before >= 2
    assert len(set(replays)) == 1


def test_sequences_may_be_at_different_positions(device: str, replays: list[object]) -> None:
    model = model_on(device)
    found = dict[bool, Reading]()
    for captures in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            set_capturing(patch, on=captures)
            alone = [read(model, begin(model), ids(device, 1, n=n), inner=INNER).state for n in (5 * M, 8 * M)]
            found[captures] = in_pieces(model, together(alone), ids(device, 3, 4), [T])
    assert_alike(found[True], found[False], device)
    assert found[True].state.positions is not None
    assert found[True].state.positions.tolist() == [5 * M + T, 8 * M + T]
    assert replays
    with pytest.MonkeyPatch.context() as patch:
        set_capturing(patch, on=False)
        last = [read(model, state, ids(device, 5, n=9), inner=INNER) for state in apart(found[True].state)]
    assert all(torch.isfinite(one.nll).all() for one in last)


def test_what_it_returns_is_nobody_elses(device: str, replays: list[object]) -> None:
    """A state is a value: the next reading changes nothing of it."""
    model, tokens = model_on(device), ids(device, 1)
    first = read(model, begin(model), tokens, inner=INNER)
    copies = [x.clone() for x in (*first.state.tensors, first.nll)]
    read(model, first.state, ids(device, 2), inner=INNER)
    for x, copy in zip((*first.state.tensors, first.nll), copies, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    assert len(set(replays)) == 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_masked_targets_and_refused_steps_are_those_of_plain_reading(device: str, replays: list[object]) -> None:
    """On a CPU a guarded step asks whether it was taken, which no graph can."""
    model, tokens = model_on(device), ids(device, 1, 2)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
    wild = dataclasses.replace(INNER, lr=1e4)
    found = []
    for captures in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            set_capturing(patch, on=captures)
            found.append(read(model, begin(model, 2), tokens, inner=wild, loss_mask=mask, guard=True))
    assert_alike(found[0], found[1], device)
    assert found[0].rolled_back.any()
    assert replays


def test_a_guard_without_steps_and_inference_mode_change_nothing(device: str, replays: list[object]) -> None:
    """As a session of a model without fast weights reads, in a caller's `torch.inference_mode`, and after it."""
    model, tokens = model_on(device, num_suffix_blocks=0), ids(device, 1)
    with torch.inference_mode():
        inside = read(model, begin(model), tokens, inner=INNER, guard=True)
    outside = read(model, begin(model), tokens, inner=INNER, guard=True)
    torch.testing.assert_close(inside.nll, outside.nll, rtol=0, atol=0, equal_nan=True)
    assert len(set(replays)) == 1
    read(model, inside.state, tokens, inner=INNER, guard=True)


def test_weights_that_have_moved_or_have_another_type_are_read_with(device: str, replays: list[object]) -> None:
    model, tokens = model_on(device), ids(device, 1)
    wide = read(model, begin(model), tokens, inner=INNER)
    if device == "cpu":
        model = model.float()
    narrow = read(model.bfloat16() if device == "cuda" else model, begin(model), tokens, inner=INNER)
    assert narrow.state.lower_pasts[0].key.dtype == model.dtype != wide.state.lower_pasts[0].key.dtype  # type: ignore[union-attr]
    torch.testing.assert_close(narrow.nll.double(), wide.nll.double(), rtol=0.05, atol=0.05, equal_nan=True)
    assert len(set(replays)) == 2


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_graph_that_computes_something_else_is_not_used(
    device: str, replays: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "off", 1.0)
    model, tokens = model_on(device), ids(device, 1)
    with pytest.warns(GraphRefused, match="reading goes on without"):
        found = in_pieces(model, begin(model), tokens, [T])
    set_capturing(monkeypatch, on=False)
    assert_alike(found, in_pieces(model, begin(model), tokens, [T]), device)
    assert len(replays) == 1


def test_where_memory_is_short_it_reads_plainly(
    device: str, replays: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured_kept, "free_bytes", lambda device: 1 << 10)
    model = model_on(device)
    read(model, begin(model), ids(device, 1), inner=INNER)
    assert not replays
