"""CUDA graphs that are checked before they are trusted, in a process where other threads use the GPU as well.

Reading, decoding and the outer step each replay one computation in place of thousands of launches. Where it begins is
the same for all: a plain run, a capture, a replay that is compared with the plain run, and if they differ one warning
and no graphs from then on.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from longread.model import can_capture

Result = TypeVar("Result")

_ALONE = threading.RLock()


class GraphRefused(UserWarning):
    """A captured graph computes something else than a plain run; it is not used."""


class CheckedGraphs(Generic[Result]):
    """CUDA graphs of computations that give a `Result`, by key, all in one pool of memory."""

    def __init__(
        self,
        device: torch.device,
        *,
        compared: Callable[[Result], Tensor],
        scale: Callable[[Tensor], Tensor | float],
        tolerance: float,
        warning: str,
        agreed: Callable[[bool], bool] = lambda good: good,
    ) -> None:
        """On another device than a GPU everything is computed plainly.

        Args:
            compared: the numbers of a result in which a replay and a plain run may differ, by `tolerance` times the
                `scale` of the plain ones.
            warning: one sentence for a graph that is not used; `{}` in it is the worst difference / scale.
            agreed: whether a graph is good on all ranks, where these compute together.
        """
        self.usable = can_capture(device)
        """False too once a graph was not good."""
        self.stream: Any = torch.cuda.Stream(device) if self.usable else None
        """Where it captures. Products have scratch memory for each stream, which graphs may not share that are replayed
        side by side; two of these that are made one after the other have two streams."""
        self._compared, self._scale, self._tolerance = compared, scale, tolerance
        self._warning, self._agreed = warning, agreed
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Result]] = {}
        self._checked: set[Hashable] = set()

    def run(
        self,
        key: Hashable,
        compute: Callable[[], Result],
        *,
        kept: Callable[[], Callable[[], None]],
        kind: Hashable = None,
    ) -> Result:
        """Computes once: by the graph of `key`, which is captured if there is none, or plainly.

        What comes of a graph lies where the next replay of it writes.

        Args:
            compute: reads what changes from run to run out of tensors that stay in place, and asks the device for no
                value.
            kept: called before a first run; gives what undoes one, so that another has the same result.
            kind: of which only the first graph is checked; None: each is.
        """
        if not self.usable:
            return compute()
        if key not in self._graphs:
            return self._first(key, compute, kept, key if kind is None else kind)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def clear(self) -> None:
        """Forgets all graphs, and with them their memory: addresses have changed."""
        self._graphs.clear()
        self._checked.clear()

    def _first(
        self, key: Hashable, compute: Callable[[], Result], kept: Callable[[], Callable[[], None]], kind: Hashable
    ) -> Result:
        if kind in self._checked:
            self._graphs[key] = graph, result = self._captured(compute)
            graph.replay()
            return result
        undo = kept()
        with self._on_its_stream():  # a capture wants kernels and libraries loaded, and this on another stream
            plain = self._compared(compute()).clone()
            undo()
        graph, result = self._captured(compute)
        self._compared(result).fill_(math.nan)  # else a graph that writes nothing may leave what the plain run wrote
        graph.replay()
        off = self._off(self._compared(result), plain)
        if self._agreed(off <= self._tolerance):
            self._graphs[key] = graph, result
            self._checked.add(kind)
            return result
        self.usable = False
        self.clear()
        del graph, result  # their memory, before a plain run needs as much
        warnings.warn(self._warning.format(off), GraphRefused, stacklevel=4)
        undo()
        return compute()

    def _captured(self, compute: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self._graphs.values()), None)
        with _capturing(graph, pool, self.stream):
            result = compute()
        return graph, result

    @contextlib.contextmanager
    def _on_its_stream(self) -> Iterator[None]:
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    def _off(self, found: Tensor, plain: Tensor) -> float:
        """The worst difference; numbers that are equally infinite, or none in both, do not differ.

        Computed on the host, as for so few numbers it takes longer to load a device's kernels.
        """
        found, plain = found.cpu(), plain.cpu()
        same = (found == plain) | (found.isnan() & plain.isnan())
        return ((found - plain).abs() / self._scale(plain)).masked_fill(same, 0.0).max().item()


def put_back_later(*tensors: Tensor) -> Callable[[], None]:
    """Copies tensors, and gives what puts the copies back into them."""
    copies = [x.clone() for x in tensors]

    def put_back() -> None:
        for x, copy in zip(tensors, copies, strict=True):
            x.copy_(copy)

    return put_back


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For large copies in another thread: seen beside them, captures were invalidated."""
    with _ALONE:
        yield


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: Any) -> Iterator[None]:
    """Captures what is done inside, on `stream`, while no other thread is inside `undisturbed`.

    `pool` is that of an earlier graph, or None.
    """
    here = torch.cuda.current_stream()  # a capture that fails leaves torch on its own
    capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    with _ALONE, torch.cuda.stream(here), capture:
        yield
