"""The two halves of the network side by side on a CPU, as on two streams of a GPU, where that is faster.

A small network is thousands of operations, most of them too short to be shared: threads that each take a part of
every one wait for each other longer than they compute. The halves meet only once in a stretch of tokens. So the lower
one runs ahead in a thread of its own, with some of the threads that operations have, and the upper one keeps the rest.
Which of both a reading does depends on the model, on how many sequences, tokens and threads there are and whether these
spin while they wait, never on time: so it gives the same bits again.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from longread.config import ModelConfig
from longread.flops import lower_flops, reading_flops
from longread.model import Past, Transformer

STRETCH = 256
"""Tokens for which the lower half runs at once here, or a mini-batch, if that is longer, and at the end of the tokens:
the last stretch is left to the upper half alone."""
AHEAD = 2
"""Stretches by which it is ahead at most."""
FEWEST = 2
"""Stretches that are worth it: the first is computed before, by all threads."""
MOST_WORK = 1e10
"""Parameters times tokens of the mini-batches of all sequences; with more, operations are long enough to be shared. On
two threads halves side by side were 1.40 times as fast at 1e9, 1.27 at 4e9 and 1.19 at 8e9."""
MOST_UNEVEN = 1.25
"""How much longer than the average of all threads those of one half may have to work."""

T = TypeVar("T")


def stretch_of(config: ModelConfig) -> int:
    """Tokens of a stretch, whole mini-batches."""
    return config.mini_batch_size * max(1, STRETCH // config.mini_batch_size)


def threads_below(model: Transformer, batch_size: int, num_tokens: int) -> int:
    """How many of this thread's threads for operations the lower half should have while so many tokens of each
    sequence are learned from; 0 where the halves are better computed one after the other."""
    config, threads = model.config, torch.get_num_threads()
    small = config.num_parameters * config.mini_batch_size * batch_size <= MOST_WORK
    if model.device.type != "cpu" or threads < 2 or not small or num_tokens < FEWEST * stretch_of(config):
        return 0
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":  # then idle threads of one half hold up the other
        return 0
    if config.kept_tokens:  # which the lower half sees is decided by what the upper one has predicted
        return 0
    below = lower_flops(config, num_tokens) / reading_flops(config, num_tokens)
    count = min(max(1, round(threads * below)), threads - 1)
    uneven = threads * max(below / count, (1 - below) / (threads - count))
    return count if uneven <= MOST_UNEVEN else 0


@torch.no_grad()
def lower_stretches(
    model: Transformer, tokens: Tensor, pasts: Sequence[Past], start: int | Tensor
) -> Iterator[tuple[Tensor, tuple[Past, ...]]]:
    """`Transformer.lower` over tokens [B, n] at positions from `start` on, and the pasts after each stretch."""
    stretch = stretch_of(model.config)
    while left := tokens.shape[1]:
        size = min(left, stretch if left >= 2 * stretch else model.config.mini_batch_size)
        part, tokens = tokens[:, :size], tokens[:, size:]
        hidden, own = model.lower(part, pasts, start=start)
        pasts = model.advance(pasts, own, 0)
        start = start + part.shape[1]
        yield hidden, pasts


class Ahead(Generic[T]):
    """Items that another thread makes while those before them are used; a context, to be gone through once.

    Args:
        items: gone through in the other thread alone. What they raise is raised here.
        threads: so many of this thread's threads for operations are the other one's in the meantime.
    """

    def __init__(self, items: Iterator[T], threads: int) -> None:
        self._items = items
        self._all, self._taken = torch.get_num_threads(), threads

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, "longread-lower", _take_threads, (self._taken, self._all))
        try:
            self._due = deque(self._pool.submit(next, self._items, None) for _ in range(AHEAD))
            _take_threads(self._all - self._taken, self._all)
        except BaseException:  # an interrupt, or there can be no other thread
            self._end()
            raise
        return self

    def __iter__(self) -> Iterator[T]:
        while (item := self._due.popleft().result()) is not None:
            self._due.append(self._pool.submit(next, self._items, None))
            yield item

    @contextlib.contextmanager
    def undivided(self) -> Iterator[None]:
        """While this thread does something else: all threads are its own."""
        _take_threads(self._all, self._all)
        try:
            yield
        finally:
            _take_threads(self._all - self._taken, self._all)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:  # who interrupts once more does not wait for what is being made
            _take_threads(self._all, self._all)


_taking = threading.Lock()


def _take_threads(count: int, default: int) -> None:
    """So many threads for the operations of this thread. PyTorch gives as many to threads that are yet to come: these
    shall have the default."""
    torch.get_num_threads()  # a thread that was never asked would take the default at its first operation
    with _taking:
        torch.set_num_threads(count)
        if count != default:
            other = threading.Thread(target=torch.set_num_threads, args=(default,))
            other.start()
            other.join()
