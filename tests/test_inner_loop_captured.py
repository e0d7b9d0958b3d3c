"""Which readings become CUDA graphs, and that they read as without; on a CPU with graphs that stand in for them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Reading, ReadingState, begin, captured, read
from longread.model import Transformer
from tests.fake_graphs import fake_graphs, set_capturing
from tests.held import Held
from tests.tiny import BY_BLOCK, GROUPED, INNER, make, text

__all__ = ["fake_graphs"]
M, STRETCH = 8, 16
KINDS = {
    "a window of two stretches": {"window_size": 32},
    "one that mini-batches do not fill": {"window_size": 31} | GROUPED,
    "shorter than a mini-batch, and no attention above it": {"window_size": 6, "num_suffix_blocks": 1},
    "by block": {"window_size": 40} | BY_BLOCK | {"block_windows": (16, 0, 20, 0)},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        request.getfixturevalue("fake_graphs")
    monkeypatch.setattr(captured, "STRETCH", STRETCH)
    return request.param


@pytest.fixture
def graphs(device: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All that are captured."""
    found: list[object] = []
    real = torch.cuda.CUDAGraph

    def make_graph() -> object:
        found.append(real())
        return found[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_graph)
    return found


def model_on(device: str, **changes: object) -> Transformer:
    plain = {"window_size": 32, "num_blocks": 4 if "block_windows" in changes else 3}
    wide = {"width": 32, "mlp_hidden": 32} if device == "cuda" else {}
    model = make(3, torch.float64, mini_batch_size=M, **plain | wide | changes)
    return model.float().cuda() if device == "cuda" else model


def in_pieces(model: Transformer, tokens: Tensor, pieces: Sequence[int]) -> tuple[ReadingState, Tensor, Tensor]:
    state, found = begin(model, len(tokens)), list[Reading]()
    for part in tokens.split(list(pieces), 1):
        found.append(read(model, state, part, inner=INNER))
        state = found[-1].state
    return state, torch.cat([one.nll for one in found], 1), torch.cat([one.inner_grad_norm for one in found], 1)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_every_place_and_past_is_read_as_without_graphs(
    changes: dict, device: str, graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and in pieces that end anywhere; captured when it pays, and all of it."""
    model = model_on(device, **changes)
    n = 11 * M + 5
    tokens = torch.tensor([text(n, seed) for seed in range(2)], device=device)
    with pytest.MonkeyPatch.context() as plain:
        set_capturing(plain, on=False)
        expected = in_pieces(model, tokens, [n])
    close = {"rtol": 1e-9, "atol": 1e-11} if device == "cpu" else {"rtol": 1e-3, "atol": 5e-3}
    for worth, pieces in ((3, [n]), (1, [3, 5 * M, 6 * M + 2]), (1, [3 * M, 3 * M, 3 * M, 2 * M + 5])):
        monkeypatch.setattr(captured, "WORTH", worth)
        found = in_pieces(model, tokens, pieces)
        assert found[0].position == n
        for a, b in zip((*found[0].tensors, *found[1:]), (*expected[0].tensors, *expected[1:]), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **close)
    assert graphs


def test_a_long_first_text_needs_few_graphs(device: str, graphs: list[object]) -> None:
    """A graph of the upper half for each of K / M places, and two of the lower: all before the text is half read."""
    model, tokens = model_on(device), torch.tensor([text(20 * M + 1)], device=device)
    state = read(model, begin(model), tokens, inner=INNER).state
    assert len(graphs) == 4 + 2
    read(model, state, tokens[:, : 20 * M], inner=INNER)
    assert len(graphs) == 4 + 2


def test_a_short_text_is_read_plainly_until_such_texts_recur(device: str, graphs: list[object]) -> None:
    model, tokens = model_on(device), torch.tensor([text(2 * M + 3)], device=device)
    counts = []
    for _ in range(4):
        read(model, begin(model), tokens, inner=INNER)
        counts.append(len(graphs))
    assert counts == [0, 0, 3, 3]  # of two pasts of the upper half, and of both mini-batches of the lower one
    read(model, begin(model, 2), tokens.expand(2, -1), inner=INNER)
    assert len(graphs) == 3


def test_the_lower_half_reads_in_few_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the first ones fill the window; their lengths are few, too."""
    monkeypatch.setattr(captured, "STRETCH", 4 * M)
    model, runs = model_on(device, window_size=6 * M), list[int]()
    real = captured.CapturedReader._run_lower
    monkeypatch.setattr(
        captured.CapturedReader, "_run_lower", lambda reader, tokens: runs.append(tokens // M) or real(reader, tokens)
    )
    read(model, begin(model), torch.tensor([text(17 * M + 5)], device=device), inner=INNER)
    assert runs == [4, 2, 4, 4, 2, 1]


def test_what_is_appended_piece_by_piece_is_captured_once_it_recurs(device: str, graphs: list[object]) -> None:
    """And then nothing more, however much comes."""
    model = model_on(device)
    state, counts = begin(model), []
    for seed in range(12):
        state = read(model, state, torch.tensor([text(M, seed)], device=device), inner=INNER).state
        counts.append(len(graphs))
    assert state.hidden.shape[1] == M
    assert counts[5] == 0
    assert counts[7:] == [3] * 5  # the step on what waits; new tokens, by both halves


def test_steps_of_a_text_that_comes_token_by_token_are_one_graph(
    device: str, graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a session that writes: once the window is full, and without memory for the lower half."""
    model, tokens = model_on(device), torch.tensor([text(12 * M + 3)], device=device)
    found = dict[bool, list[Reading]]()
    guard = device == "cuda"  # a CPU waits for what it says, which cannot be captured
    for captures in (True, False):
        set_capturing(monkeypatch, on=captures)
        state, found[captures] = begin(model), []
        for token in tokens.split(1, 1):
            found[captures].append(read(model, state, token, inner=INNER, guard=guard))
            state = found[captures][-1].state
    assert len(graphs) == 1
    (reader,) = captured._READERS[model].values()
    assert "_lower" not in vars(reader)
    close = {"rtol": 1e-9, "atol": 1e-11} if device == "cpu" else {"rtol": 1e-3, "atol": 5e-3}
    for ours, plain in zip(found[True], found[False], strict=True):
        for a, b in zip((*ours.state.tensors, *ours[1:4]), (*plain.state.tensors, *plain[1:4]), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **close)


def test_a_step_is_taken_plainly_where_memory_is_short(
    device: str, graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that writes has not asked for memory as who reads a long text has."""
    monkeypatch.setattr(captured, "WORTH", 1)
    model, tokens = model_on(device), torch.tensor([text(5 * M)], device=device)
    state = read(model, begin(model), tokens[:, : 5 * M - 1], inner=INNER).state
    del captured._READERS[model]
    for free, captures in ((0, 0), (1 << 40, 1)):
        monkeypatch.setattr(captured, "free_bytes", lambda device, free=free: free)
        graphs.clear()
        full = read(model, state, tokens[:, -1:], inner=INNER).state
        found = read(model, full, tokens[:, :1], inner=INNER)
        assert found.inner_grad_norm.shape == (1, 1)
        assert len(graphs) == captures


def test_threads_that_share_a_reader_take_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is held amid its step, which the other would take up otherwise."""
    model = model_on(device)
    begun = [read(model, begin(model), torch.tensor([text(M, i)], device=device), inner=INNER).state for i in range(2)]
    token = torch.tensor([[3]], device=device)
    expected = [read(model, state, token, inner=INNER).state for state in begun]
    score = Held(captured.CapturedReader._score)
    monkeypatch.setattr(captured.CapturedReader, "_score", lambda *args: score(*args))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(read, model, begun[0], token, inner=INNER)
        assert score.entered.wait(120)
        second = threads.submit(read, model, begun[1], token, inner=INNER)
        wait([second], timeout=0.5)
        score.go()
        for found, state in zip((first.result(120).state, second.result(120).state), expected, strict=True):
            for a, b in zip(found.tensors, state.tensors, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_threads_that_come_at_once_share_one_reader(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second asks while the first one's is being made."""
    model = model_on(device)
    state, token = read(model, begin(model), torch.tensor([text(M)], device=device), inner=INNER).state, [[3]]
    made, real = list[object](), captured.CapturedReader.__init__
    make_it = Held(lambda reader, *args, **kwargs: made.append(reader) or real(reader, *args, **kwargs))
    monkeypatch.setattr(captured.CapturedReader, "__init__", lambda *args, **kwargs: make_it(*args, **kwargs))
    captured._READERS.pop(model, None)
    with ThreadPoolExecutor(2) as threads:
        one, other = (
            threads.submit(read, model, state, torch.tensor(token, device=device), inner=INNER) for _ in range(2)
        )
        assert make_it.entered.wait(120)
        wait([one, other], timeout=0.5)
        make_it.go()
        one.result(120), other.result(120)
    assert len(made) == 1


def test_the_number_of_graphs_is_bounded(device: str, graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "WORTH", 1)
    model, n = model_on(device, window_size=2 * M), 9 * M
    for pieces in ([n], [M, n - M], [2 * M, n - 2 * M], [3 * M, M, n - 4 * M]):
        in_pieces(model, torch.tensor([text(n)], device=device), pieces)
    assert len(graphs) <= (2 + 2) + (2 + 2 + 1)  # places and pasts of the upper half, and of the lower one; a stretch


def test_readers_are_kept_as_long_as_they_are_used(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "READERS", 2)
    model = model_on(device)
    readers = [captured.captured_reader(model, begin(model, size), INNER, guard=False) for size in (1, 2, 1, 3, 1, 2)]
    assert readers[0] is readers[2] is readers[4]
    assert readers[1] is not readers[5]


def test_readers_of_several_sequences_leave_most_of_the_memory_free(
    device: str, graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, texts are read plainly; one that is there already stays."""
    monkeypatch.setattr(captured, "WORTH", 1)
    model, tokens = model_on(device), torch.tensor([text(M + 1)] * 2, device=device)
    for free, size, captures in ((0, 2, 0), (0, 1, 2), (1 << 40, 2, 4), (0, 2, 4)):
        monkeypatch.setattr(captured, "free_bytes", lambda device, free=free: free)
        found = read(model, begin(model, size), tokens[:size], inner=INNER)
        assert found.nll[:, 1:].isfinite().all()
        assert len(graphs) == captures
