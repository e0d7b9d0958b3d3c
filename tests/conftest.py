"""What every test shares: no network, no screen, a fixed seed, the default dtype put back; kernels without a GPU."""

from __future__ import annotations

import gc
import importlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tests.disk import Disk


def pytest_configure() -> None:
    settings.register_profile("untimed", deadline=None)  # a loaded machine is no fault
    settings.load_profile("untimed")
    os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", WANDB_MODE="disabled")
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:  # in a shell's background, under nohup; what is ignored stays so
            signal.signal(number, default)
    if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # decides what Triton is when it is first imported, by whomever


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest single tests begin first: no worker ends alone with one of them."""
    long = {"test_wheel.py", "test_docs_pretrained.py", "test_bench.py"}
    items.sort(key=lambda item: item.path.name not in long)


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: the cores that this process may use, two threads of a core counted as two."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture
def disk() -> Iterator[Disk]:
    """What databases and `os.fsync` write passes its `hook`."""
    with Disk() as watched:
        yield watched


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: Triton's interpreter, which works with NumPy 2.4, rounds to bfloat16 as a GPU does, and takes less
    than half the time: at every call of a function by a kernel it would patch Triton's language anew."""
    if torch.cuda.is_available():
        return
    module = importlib.import_module("triton.runtime.interpreter")
    patch_tensor, convert, patch = module._patch_lang_tensor, module._convert_float, module._patch_lang
    of_kernel: Any = None  # undone when the kernel ends
    done: set[str] = set()

    def patched_once(function: Any) -> Any:
        nonlocal of_kernel
        if of_kernel is None or not of_kernel._changes:
            done.clear()
            of_kernel = patch(function)
        elif function.__module__ not in done:  # which may know the language by another name
            patch(function)
        done.add(function.__module__)
        return of_kernel

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def to_nearest(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(x, source, target, mode)
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(module, "_patch_lang", patched_once)
    monkeypatch.setattr(module, "_patch_lang_tensor", patched)
    monkeypatch.setattr(module, "_convert_float", to_nearest)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is not a number."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(math.nan) if out.is_floating_point() else out

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device; leave it out with -m 'not gpu'", pytrace=False)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
