"""A GPU by its vendor's data sheet: memory, bfloat16 products, and links to other GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from longread.config import UserError

SEEN = 0.99
"""Of the memory that a data sheet names in GB, what programs see of it in GiB (an H200 of 141 GB shows 139.8)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, whose links are told for one direction. Dense products, no sparsity."""

    name: str
    memory: float
    """Bytes that programs see."""
    flops: float
    """Of bfloat16 products per second, at the peak."""
    memory_bandwidth: float
    """Bytes per second."""
    link: float
    """Bytes per second to the GPUs of the same node: half of what NVLink is sold as, which counts both directions."""
    network: float
    """Bytes per second to other nodes: one adapter for each GPU, as in the vendor's own servers."""
    source: str


def _gpu(name: str, gb: float, tflops: float, tb_per_s: float, nvlink: float, gbit_per_s: float, source: str) -> Gpu:
    """In the units of data sheets; `nvlink` in GB/s of both directions together."""
    memory, link, network = SEEN * gb * 2**30, nvlink * 1e9 / 2, gbit_per_s * 1e9 / 8
    return Gpu(name, memory, tflops * 1e12, tb_per_s * 1e12, link, network, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 312, 2.039, 600, 200, "https://www.nvidia.com/en-us/data-center/a100/"),
        _gpu("h100", 80, 989.4, 3.35, 900, 400, "https://www.nvidia.com/en-us/data-center/h100/"),
        _gpu("h200", 141, 989.4, 4.8, 900, 400, "https://www.nvidia.com/en-us/data-center/h200/"),
        _gpu("b200", 180, 2250, 8.0, 1800, 400, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    )
}
"""SXM modules. Adapters: https://docs.nvidia.com/dgx/dgxa100-user-guide/, https://docs.nvidia.com/dgx/dgxh100-user-guide/
(H200 too), https://docs.nvidia.com/dgx/dgxb200-user-guide/. Products of the B200 without sparsity are half of what
https://www.nvidia.com/en-us/data-center/hgx/ names for eight with it."""


def gpu_named(name: str) -> Gpu:
    """Raises `UserError` for a name that is not in the table."""
    if name not in GPUS:
        raise UserError(f"there is no GPU {name!r} in the table; choose from {', '.join(GPUS)}")
    return GPUS[name]


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 operations per second of a device that is called so by its driver; None if it is not in the table.

    Cards for PCIe and for NVL are slower than the modules of the table, and a MIG instance is a part of one.
    """
    if re.search(r"\b(PCIe|NVL|MIG)\b", device, re.IGNORECASE):
        return None
    return next((gpu.flops for gpu in GPUS.values() if re.search(rf"\b{gpu.name}\b", device, re.IGNORECASE)), None)
