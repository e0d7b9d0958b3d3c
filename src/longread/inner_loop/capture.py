"""Capturing CUDA graphs in a process where other threads use the GPU as well."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_ALONE = threading.RLock()


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Captures what is done inside, while no other thread is inside `undisturbed`.

    `pool` is that of an earlier graph, or None.
    """
    with _ALONE, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For large copies in another thread: seen beside them, captures were invalidated."""
    with _ALONE:
        yield
