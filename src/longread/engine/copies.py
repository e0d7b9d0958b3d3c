"""States on their way between a GPU and the host's memory: in pieces of page-locked memory, on a stream of their own.

A GPU copies by itself only from and to memory that is page-locked. There is little of that, so a session does not stay
in it: one piece is filled while the one before is emptied.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from longread.inner_loop import ReadingState
from longread.inner_loop.graphs import undisturbed
from longread.inner_loop.state import moved_to

PIECE = 2**24
"""Bytes of a piece; there are two."""


class Staging:
    """Two pieces of the host's memory that copies pass in turn, page-locked where `device` is a GPU."""

    def __init__(self, device: torch.device, nbytes: int = PIECE) -> None:
        gpu = device.type == "cuda"
        self._pieces = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=gpu) for _ in range(2)]
        self._passed = [torch.cuda.Event() for _ in range(2)] if gpu else []
        self._lock = threading.Lock()

    def moved(self, x: Tensor, device: torch.device) -> Tensor:
        """The same tensor on another device, on the current stream; what is there already is not copied."""
        if x.device == device:
            return x
        found = torch.empty(x.shape, dtype=x.dtype, device=device)
        self.copy(x.contiguous(), found)
        return found

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies between contiguous tensors of one shape and type, of which one is the host's."""
        inward = source.device.type == "cuda"
        size = len(self._pieces[0])
        parts = list(zip(*(x.view(-1).view(torch.uint8).split(size) for x in (source, target)), strict=True))
        with self._lock:
            for number, (part, place) in enumerate(parts):
                piece = self._pieces[number % 2][: len(part)]
                self._wait(number)
                if inward:
                    piece.copy_(part, non_blocking=True)
                    self._record(number)
                    self._empty(number - 1, parts)
                else:
                    _copy_alone(part, piece)
                    place.copy_(piece, non_blocking=True)
                    self._record(number)
            if inward:
                self._empty(len(parts) - 1, parts)
            for number in range(2):
                self._wait(number)

    def _empty(self, number: int, parts: list[tuple[Tensor, ...]]) -> None:
        if number >= 0:
            self._wait(number)
            _, place = parts[number]
            _copy_alone(self._pieces[number % 2][: len(place)], place)

    def _record(self, number: int) -> None:
        if self._passed:
            self._passed[number % 2].record()

    def _wait(self, number: int) -> None:
        """Until the GPU has done what was asked of a piece."""
        if self._passed:
            self._passed[number % 2].synchronize()


def _copy_alone(source: Tensor, target: Tensor) -> None:
    """Within the host's memory, by this thread alone: PyTorch's threads wait for one another at the end of each piece,
    which on busy processors takes longer than the copy.
    """
    target.numpy()[:] = source.numpy()


_staging = functools.cache(Staging)


def carried(state: ReadingState, device: torch.device) -> ReadingState:
    """The same state on another device, inside `beside`; what is there already is not copied."""
    here = state.output.device
    if here == device:
        return state
    moved = moved_to(state, device, _staging(here if here.type == "cuda" else device).moved)
    if device.type == "cuda":  # the memory belongs to this stream and is read by another
        for x in moved.tensors:
            x.record_stream(torch.cuda.default_stream(device))
    return moved


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On a GPU: a stream of its own, so that large copies do not wait for what is computed, nor the other way round."""
    if device.type != "cuda":
        yield
        return
    with undisturbed():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
