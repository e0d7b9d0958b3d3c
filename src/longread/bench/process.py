"""Processes of their own, and caches of compiled kernels with nothing in them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


def in_a_process(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns, or raises, in a fresh process with as many threads as this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), work, *arguments).result()


def _with_threads(threads: int, work: Callable[..., T], *arguments: Any) -> T:
    torch.set_num_threads(threads)
    return work(*arguments)


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """For the processes that are started inside: the first finds nothing compiled, the next what it left."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in _CACHES}
    with tempfile.TemporaryDirectory() as directory:
        os.environ.update(dict.fromkeys(_CACHES, directory))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
