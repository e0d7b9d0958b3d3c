"""CUDA graphs that are checked: when they are used, what comes of those that are off; reading and writing by them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop import Decoder, begin, captured, graphs, places, read, register_inner_optimizer
from longread.inner_loop.graphs import CheckedGraphs, GraphRefused, can_capture, put_back_later, undisturbed
from longread.model import Transformer
from tests.fake_graphs import FakeGraph, fake_graphs, set_capturing
from tests.tiny import BY_BLOCK, GROUPED, INNER, make, text

__all__ = ["fake_graphs"]
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


class Counter:
    """Counts in place, as a token or a mini-batch does; `checked` of it are compared."""

    def __init__(self, scale: Callable[[Tensor], Tensor | float] = lambda plain: 1.0, **options: object) -> None:
        self.graphs = CheckedGraphs[Tensor](
            CPU, compared=lambda x: x, scale=scale, tolerance=0.1, warning="{:.2g} off; without", **options
        )
        self.count, self.computed = torch.zeros(2), 0

    def run(self, key: object = "a", kind: object = None) -> list[float]:
        return self.graphs.run(key, self.compute, kept=lambda: put_back_later(self.count), kind=kind).tolist()

    def compute(self) -> Tensor:
        self.computed += 1
        self.count += 1
        return self.count * 2


@pytest.mark.usefixtures("fake_graphs")
def test_each_run_counts_once_and_only_the_first_computes() -> None:
    counter = Counter()
    assert [counter.run() for _ in range(3)] == [[2, 2], [4, 4], [6, 6]]
    assert counter.computed == 2  # plain, and captured
    assert counter.run("b") == [8, 8]
    assert counter.computed == 4
    assert [counter.run("c", "of a kind"), counter.run("d", "of a kind")] == [[10, 10], [12, 12]]
    assert counter.computed == 7  # the second of a kind is not checked
    counter.graphs.clear()
    assert counter.run("c", "of a kind") == [14, 14]
    assert counter.computed == 9


def test_there_are_no_graphs_on_a_cpu() -> None:
    counter = Counter()
    assert not counter.graphs.usable
    assert [counter.run() for _ in range(3)] == [[2, 2], [4, 4], [6, 6]]
    assert counter.computed == 3
    assert [can_capture(torch.device(name)) for name in ("cpu", "cuda:1", "meta")] == [False, True, False]


def test_a_graph_that_is_off_is_refused_with_one_warning(
    fake_graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And counts all the same."""
    counter = Counter()
    counter.run("good")
    made = weakref.ref(counter.graphs._graphs["good"][0])
    monkeypatch.setattr(fake_graphs, "off", 0.25)
    with pytest.warns(GraphRefused, match=r"^\d.* off; without$") as said:
        found = [counter.run(key) for key in ("a", "a", "good", "b")]
    assert found == [[4, 4], [6, 6], [8, 8], [10, 10]]
    assert len(said) == 1
    assert not counter.graphs.usable
    gc.collect()
    assert made() is None  # it held memory


@pytest.mark.parametrize(
    ("off", "scale", "good"),
    [
        (0.0, lambda plain: 1.0, True),
        (0.02, lambda plain: 1.0, True),
        (0.2, lambda plain: 1.0, False),
        (0.2, lambda plain: 10.0, True),
        (0.02, Tensor.abs, True),
        (0.7, Tensor.abs, False),
        (NAN, lambda plain: 1.0, False),
        (INF, lambda plain: 1.0, False),
    ],
    ids=range(8),
)
def test_how_far_it_may_be_off(
    off: float,
    scale: Callable[[Tensor], Tensor | float],
    good: bool,
    fake_graphs: type[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(fake_graphs, "off", off)
    counter = Counter(scale)
    counter.run()
    assert counter.graphs.usable == good
    assert len(recwarn) == (not good)


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("number", [NAN, INF, -INF, 0.0])
def test_what_a_plain_run_gives_too_is_not_off(number: float) -> None:
    counter = Counter(Tensor.abs)
    counter.count.copy_(torch.tensor([number, 1.0]))
    counter.run()
    assert counter.graphs.usable


@pytest.mark.parametrize(("off", "others", "good"), [(0.0, True, True), (0.0, False, False), (0.25, False, False)])
def test_all_ranks_decide(
    off: float, others: bool, good: bool, fake_graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def agreed(own: bool) -> bool:
        asked.append(own)
        return own and others

    monkeypatch.setattr(fake_graphs, "off", off)
    counter = Counter(agreed=agreed)
    if good:
        assert counter.run() == [2, 2]
    else:
        with pytest.warns(GraphRefused):
            assert counter.run() == [2, 2]
    assert asked == [off == 0.0]
    assert counter.graphs.usable == good


@pytest.mark.usefixtures("fake_graphs")
def test_what_cannot_be_captured_raises_and_leaves_nothing() -> None:
    counter = Counter()

    def waits() -> Tensor:
        return counter.compute() * (counter.count[0].item() if counter.computed > 1 else 1.0)

    with pytest.raises(RuntimeError, match="waits for the device"):
        counter.graphs.run("a", waits, kept=lambda: put_back_later(counter.count))
    counter.count.zero_()
    counter.computed = 0
    assert [counter.run(), counter.run()] == [[2, 2], [4, 4]]
    assert counter.computed == 2


@pytest.mark.usefixtures("fake_graphs")
def test_nothing_is_captured_beside_a_copy_of_another_thread() -> None:
    copying, copied, done = threading.Event(), threading.Event(), threading.Event()
    counter = Counter()

    def copies() -> None:
        with undisturbed():
            copying.set()
            copied.wait(60)

    def runs() -> None:
        counter.run()
        done.set()

    threads = [threading.Thread(target=copies), threading.Thread(target=runs)]
    threads[0].start()
    assert copying.wait(60)
    threads[1].start()
    assert not done.wait(0.2)
    assert counter.computed <= 1  # the plain run may be over
    copied.set()
    for thread in threads:
        thread.join(60)
    assert done.is_set()
    assert counter.computed == 2


def test_a_graph_that_writes_nothing_is_off(fake_graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain run has left the right numbers in the same place."""
    counter, result = Counter(), torch.zeros(2)
    monkeypatch.setattr(fake_graphs, "replay", lambda graph: None)
    with pytest.warns(GraphRefused):
        counter.graphs.run("a", lambda: result.copy_(counter.compute()), kept=lambda: put_back_later(counter.count))
    assert result.tolist() == [2, 2]


KINDS = {
    "grouped": {"window_size": 24} | GROUPED,
    "by block": {"window_size": 40} | BY_BLOCK | {"block_windows": (16, 0, 20, 0)},
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many operations each was."""
    found: list[int] = []

    def replay(graph: FakeGraph, real: Callable[[FakeGraph], None] = FakeGraph.replay) -> None:
        found.append(len(graph.recording.calls))
        real(graph)

    monkeypatch.setattr(FakeGraph, "replay", replay)
    return found


def wild(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
    """Steps of which the guard refuses those of the second sequence."""
    odd = torch.arange(len(weights[0])).view(-1, 1, 1) % 2 == 1
    return [torch.where(odd, w + 1e6, w - 0.1 * g) for w, g in zip(weights, gradients, strict=True)]


register_inner_optimizer("wild", wild)


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_reading_by_graphs_is_reading(changes: dict, replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches and mini-batches, strips that wrap, pieces that end anywhere, and a guard that refuses steps."""
    monkeypatch.setattr(captured, "STRETCH", 16)
    monkeypatch.setattr(captured, "WORTH", 1)
    model = make(3, torch.float64, mini_batch_size=8, **changes)
    tokens = torch.tensor([text(77, seed) for seed in range(2)])
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) > 0.2
    for inner, pieces in ((INNER, [7, 58, 12]), (InnerConfig(optimizer="wild"), [77])):
        options = {"inner": inner, "guard": inner.optimizer == "wild"}
        with pytest.MonkeyPatch.context() as plain:
            set_capturing(plain, on=False)
            expected = read(model, begin(model, 2), tokens, loss_mask=mask, **options)
        assert expected.rolled_back[1].all() == options["guard"]
        replays.clear()
        state, found = begin(model, 2), []
        for part, counted in zip(tokens.split(pieces, 1), mask.split(pieces, 1), strict=True):
            found.append(read(model, state, part, loss_mask=counted, **options))
            state = found[-1].state
        assert len(set(replays)) > 1
        assert state.position == expected.state.position
        for a, b in zip(state.tensors, expected.state.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        for name in ("nll", "inner_grad_norm", "rolled_back"):
            made = torch.cat([getattr(one, name) for one in found], dim=1)
            torch.testing.assert_close(made, getattr(expected, name), rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(
    ("good", "said"), [(0, "give hidden states .* of their norm"), (2, "score a token .* nats")], ids=["lower", "upper"]
)
def test_a_reading_whose_graph_is_off_goes_on_without(
    good: int, said: str, fake_graphs: type[FakeGraph], replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the half of the network that comes first, or, after so many that are good, of the other."""
    monkeypatch.setattr(captured, "STRETCH", 16)
    monkeypatch.setattr(captured, "WORTH", 1)
    model, tokens = make(3, torch.float64, mini_batch_size=8, window_size=16), torch.tensor([text(90)])
    with pytest.MonkeyPatch.context() as plain:
        set_capturing(plain, on=False)
        expected = read(model, begin(model), tokens, inner=INNER)
    monkeypatch.setattr(fake_graphs, "off", property(lambda graph: 0.0 if len(replays) <= good else 0.5))
    with pytest.warns(GraphRefused, match=rf"^captured mini-batches {said} off; reading goes on without$") as warned:
        found = read(model, begin(model), tokens, inner=INNER)
    assert len(warned) == 1
    assert len(replays) == good + 1
    torch.testing.assert_close(found.nll, expected.nll, rtol=1e-9, atol=1e-11, equal_nan=True)
    for a, b in zip(found.state.tensors, expected.state.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    again = read(model, begin(model), tokens, inner=INNER)  # and without a warning
    assert torch.equal(again.nll[:, 1:], expected.nll[:, 1:])
    assert len(replays) == good + 1


def written(model: Transformer, tokens: Tensor) -> tuple[Decoder, Tensor]:
    """A decoder that has read token after token but for the first five, and the logits after each."""
    decoder = Decoder(model, read(model, begin(model, len(tokens)), tokens[:, :5], inner=INNER).state, INNER)
    logits = []
    for token in tokens[:, 5:].unbind(1):
        decoder.read(token)
        logits.append(decoder.logits())
    return decoder, torch.stack(logits)


@pytest.mark.usefixtures("fake_graphs")
def test_the_step_of_who_writes_becomes_a_graph(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third on that finds a full window; what its guard refuses is counted as without."""
    model = make(3, torch.float64, mini_batch_size=8, window_size=16)
    tokens, inner = torch.tensor([text(75, seed) for seed in range(2)]), InnerConfig(optimizer="wild")
    found, counts = [], []
    for captures in (False, True):
        set_capturing(monkeypatch, on=captures)
        replays.clear()
        decoder = Decoder(model, read(model, begin(model, 2), tokens[:, :5], inner=inner).state, inner)
        for token in tokens[:, 5:].unbind(1):
            decoder.read(token)
        found.append((decoder.logits(), decoder.rolled_back, *decoder.end()[0].tensors))
        counts.append(len(replays))
        assert (decoder.steps, decoder.rolled_back) == (9, 9)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert counts == [70, 70 + 9 - 2 - 2]


@pytest.mark.usefixtures("fake_graphs")
def test_a_pass_that_cannot_be_captured_leaves_the_text_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was computed once before, to be compared with."""

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, tokens = make(3, torch.float64), torch.tensor([text(5)])
    decoder = Decoder(model, read(model, begin(model), tokens, inner=INNER).state, INNER)
    before, logits = decoder.state(), decoder.logits()
    monkeypatch.setattr(CheckedGraphs, "_captured", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.read(torch.tensor([3]))
    assert torch.equal(decoder.logits(), logits)
    assert torch.equal(decoder.state().output, before.output)


@pytest.mark.parametrize("off", [0.0, 0.5])
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, GROUPED], ids=str)
def test_writing_by_graphs_is_writing(
    changes: dict,
    off: float,
    fake_graphs: type[FakeGraph],
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Also where a graph is off, from the token on with which that is found."""
    monkeypatch.setattr(places, "SPARE", 16)
    set_capturing(monkeypatch, on=False)
    model, tokens = make(3, torch.float64, **changes), torch.tensor([text(40, seed) for seed in range(2)])
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(graphs, "can_capture", lambda device: False)
        expected, logits = written(make(3, torch.float64, **changes), tokens)
    assert not replays
    monkeypatch.setattr(fake_graphs, "off", off)
    found, others = written(model, tokens)
    assert len(replays) == (1 if off else 35)
    torch.testing.assert_close(others, logits, rtol=1e-9, atol=1e-11)
    for a, b in zip(found.state().tensors, expected.state().tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(recwarn) == bool(off)
    assert all(str(warning.message).startswith("a captured pass gives logits ") for warning in recwarn)
