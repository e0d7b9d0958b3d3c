"""The machine under measurement: what it gives at best, its clock, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longread import record
from longread.config import Precision

_DRIVER = Path("/proc/driver/nvidia/version")
_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine:
    """The best of a device, measured in the same run as everything that is compared with it."""

    name: str
    matmul: str
    """Which product was measured."""
    flops: float
    """Per second, in that product."""
    bandwidth: float
    """Bytes per second, read or written, of copying."""

    def or_better(self, other: Machine) -> Machine:
        """The better of two measurements of one machine: other work makes a peak lower, and nothing makes it higher."""
        return replace(self, flops=max(self.flops, other.flops), bandwidth=max(self.bandwidth, other.bandwidth))


def precision_on(device: torch.device) -> Precision:
    """The type of products, as `longread train` and `longread read` choose it."""
    return "bfloat16" if device.type == "cuda" else "float32"


def measure_machine(device: torch.device) -> Machine:
    """Times one large product and one large copy."""
    gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    x = torch.randn(n, n, device=device).to(dtype)
    typical = statistics.median if gpu else min  # a CPU is shared with others
    product = typical(repeated(device, lambda: x @ x, 20 if gpu else 10))
    source = torch.zeros(1 << (30 if gpu else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = typical(repeated(device, lambda: target.copy_(source), 20 if gpu else 10))
    return Machine(name_of(device), f"{str(dtype)[6:]} {n}³", 2 * n**3 / product, 2 * source.nbytes / copy)


def name_of(device: torch.device) -> str:
    """Of the GPU, or of the processor with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = record.hardware()
    return f"{facts['processor']}, {facts['threads']} threads"


def versions(device: torch.device) -> dict[str, str | None]:
    """Of what makes a measure fast or slow there; None where there is no such thing, like the driver of a CPU."""
    found = {"torch": torch.__version__, "triton": None, "python": platform.python_version(), "driver": None}
    return found | {"device": name_of(device)} | (_of_gpus() if device.type == "cuda" else {})


def _of_gpus() -> dict[str, str | None]:
    triton = driver = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text(encoding="utf-8"))
        driver = found[1] if found else None
    return {"triton": triton, "driver": driver}


def synchronize(device: torch.device) -> None:
    """Returns when the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """That `work` takes, until the device is done with it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def repeated(device: torch.device, work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run after one that is not counted."""
    work()
    return [seconds(device, work) for _ in range(repeats)]


def free_memory(device: torch.device) -> None:
    """Gives back what nobody holds any more, and begins to watch for a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            _FORGET_PEAK.write_text("5", encoding="ascii")  # Linux; elsewhere there is no peak in the rows


def peak_gib(device: torch.device) -> float | None:
    """Most memory held since `free_memory`: what PyTorch reserved on a GPU, the whole process on a CPU with Linux.

    Reserved and not allocated, because a CUDA graph holds memory that no tensor does.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved(device) / 2**30, 1)
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 2**20, 2)
    return None
