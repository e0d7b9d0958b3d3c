"""The lower half of the network in a thread of its own: the same reading, and threads as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Reading, begin, halves, read
from longread.model import Transformer
from tests.tiny import INNER, M, make, text

ALL = 2
"""Threads for operations in these tests."""


@pytest.fixture(autouse=True)
def several_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two mini-batches are a stretch, and halves need not be equal."""
    monkeypatch.setattr(halves, "STRETCH", 2 * M)
    monkeypatch.setattr(halves, "MOST_UNEVEN", ALL)
    before = torch.get_num_threads()
    torch.set_num_threads(ALL)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The thread of every pass through the lower half, and how many that one had for its operations."""
    found, lower = list[tuple[str, int]](), Transformer.lower

    def watched(*args: object, **options: object) -> object:
        found.append((threading.current_thread().name, torch.get_num_threads()))
        return lower(*args, **options)

    monkeypatch.setattr(Transformer, "lower", watched)
    return found


def reading(model: Transformer, n: int, start: int = 3 * M, *, threads: int = ALL, **options: object) -> Reading:
    """Two texts of `start` tokens that were read by one thread, and then n more."""
    tokens = torch.tensor([text(start + n), text(start + n, 1)])
    torch.set_num_threads(1)
    state = read(model, begin(model, 2), tokens[:, :start], inner=INNER).state
    torch.set_num_threads(threads)
    return read(model, state, tokens[:, start:], inner=INNER, guard=True, top=3, **options)


def default_threads() -> int:
    """What a new thread begins with."""
    found = list[int]()
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def numbers(found: Reading) -> list[Tensor]:
    return [found.nll, found.inner_grad_norm, *(found.top or ()), *found.state.tensors]


@pytest.mark.parametrize("changes", [{}, {"attention": "hybrid", "num_blocks": 6}])
@pytest.mark.parametrize("start", [0, 3 * M + 1, 4 * M])
@pytest.mark.parametrize("more", [0, 1, M + 2])
def test_it_is_the_reading_of_one_half_after_the_other(
    changes: dict[str, object],
    start: int,
    more: int,
    stretches: list[tuple[str, int]],
) -> None:
    model = make(0, torch.float64, **changes)
    found = reading(model, 7 * M + more, start)
    assert sum(name.startswith("longread-lower") for name, _ in stretches) >= 3
    stretches.clear()
    expected = reading(model, 7 * M + more, start, threads=1)
    assert {name for name, _ in stretches} == {threading.current_thread().name}
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert found.state.position == expected.state.position


def test_it_gives_the_same_bits_again() -> None:
    model = make(0)
    for one, other in zip(numbers(reading(model, 9 * M)), numbers(reading(model, 9 * M)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_threads_are_divided_while_it_reads_and_all_there_in_pauses_and_afterwards(
    stretches: list[tuple[str, int]],
) -> None:
    model, here = make(0), list[tuple[int, int]]()
    below = halves.threads_below(model, 2, 8 * M)
    assert 0 < below < ALL
    reading(model, 8 * M, pause=lambda: here.append((torch.get_num_threads(), default_threads())))
    aside = {threads for name, threads in stretches if name.startswith("longread-lower")}
    assert aside == {below}
    assert len(here) >= 4
    assert set(here) == {(ALL, ALL)}
    assert (torch.get_num_threads(), default_threads()) == (ALL, ALL)


def test_who_is_given_up_in_a_pause_leaves_nothing_behind() -> None:
    def pause() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        reading(make(0), 8 * M, pause=pause)
    assert torch.get_num_threads() == ALL
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("longread-lower")]


def test_what_fails_below_fails_here() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise MemoryError("of the other thread")

    found = list[int]()
    with pytest.raises(MemoryError, match="other thread"), halves.Ahead(items(), 1) as ahead:
        found += ahead
    assert found == [1]
    assert torch.get_num_threads() == ALL


def test_interrupts_leave_all_threads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """While threads are divided, and once more while the end of the other thread is waited for."""
    taken, waited = halves._take_threads, ThreadPoolExecutor.shutdown
    interrupts = [False, True]  # the last is the first

    def take(count: int, default: int) -> None:
        taken(count, default)
        if threading.current_thread() is threading.main_thread() and interrupts.pop():
            raise KeyboardInterrupt

    def shutdown(pool: ThreadPoolExecutor, **options: bool) -> None:
        waited(pool, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(halves, "_take_threads", take)
        with pytest.raises(KeyboardInterrupt), halves.Ahead(iter([1]), 1):
            pass
    assert (torch.get_num_threads(), default_threads()) == (ALL, ALL)
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
        with pytest.raises(KeyboardInterrupt), halves.Ahead(iter([1]), 1) as ahead:
            assert list(ahead) == [1]
    assert (torch.get_num_threads(), default_threads()) == (ALL, ALL)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("longread-lower")]


@pytest.mark.parametrize(
    ("tokens", "threads", "found"), [(4 * M, 2, 1), (4 * M - 1, 2, 0), (4 * M, 1, 0)], ids=["", "short", "one thread"]
)
def test_short_texts_and_a_single_thread_are_not_divided(tokens: int, threads: int, found: int) -> None:
    torch.set_num_threads(threads)
    assert halves.threads_below(make(0), 1, tokens) == found


@pytest.mark.parametrize(
    "changes", [{"num_blocks": 4, "num_suffix_blocks": 4}, {"num_blocks": 8, "num_suffix_blocks": 1}]
)
def test_halves_of_much_unlike_work_take_turns(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(0, **changes)
    assert halves.threads_below(model, 1, 8 * M) == 1
    monkeypatch.setattr(halves, "MOST_UNEVEN", 1.25)
    assert halves.threads_below(model, 1, 8 * M) == 0


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (4 * M, [2 * M, M, M]),
        (7 * M + 1, [2 * M, 2 * M, M, M, M, 1]),
        (8 * M, [2 * M, 2 * M, 2 * M, M, M]),
    ],
)
def test_stretches_are_short_at_the_end(tokens: int, sizes: list[int]) -> None:
    model = make(0)
    lower, _ = model.empty_pasts(1)
    found = halves.lower_stretches(model, torch.tensor([text(tokens)]), lower, 0)
    assert [hidden.shape[1] for hidden, _ in found] == sizes


def test_large_networks_share_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(0)
    assert halves.threads_below(model, 2, 8 * M)
    monkeypatch.setattr(halves, "MOST_WORK", 2 * model.config.num_parameters * M - 1)
    assert halves.threads_below(model, 1, 8 * M)
    assert not halves.threads_below(model, 2, 8 * M)


def test_threads_that_spin_share_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(0)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert halves.threads_below(model, 1, 8 * M)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not halves.threads_below(model, 1, 8 * M)


def test_where_tokens_are_kept_the_halves_take_turns(stretches: list[tuple[str, int]]) -> None:
    threads = []
    for count in (0, 5):
        reading(make(3, kept_tokens=count), 12 * M)
        threads.append({name for name, _ in stretches})
        stretches.clear()
    assert len(threads[0]) == 2
    assert threads[1] == {threading.current_thread().name}
