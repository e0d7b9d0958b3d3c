"""Where a model runs, what memory is free there, and whether there are CUDA graphs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from longread.config import UserError

MEMORY_INFO, CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one. Raises `UserError` if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if "device string" in reason:  # a list of all that torch has ever known
            reason = "there is no such device"
        raise UserError(f"device {name} cannot be used ({reason}); give auto, cpu, cuda or cuda:1") from None
    return torch.device(name)


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs."""
    return device.type == "cuda"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, says that memory ran out: Python's, NumPy's, or PyTorch's on any device."""
    while error is not None:
        said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said):
            return True
        error = error.__cause__ or error.__context__  # a CUDA graph that cannot be captured has reasons of its own
    return False


def free_bytes(device: torch.device) -> int:
    """The memory that programs can still take: of a GPU, or of the machine, or of the container if that leaves less."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = [size for size in (_available(MEMORY_INFO), _left_to_container(CONTROL_GROUP)) if size is not None]
    if not found:  # macOS does not say what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(found)


def _available(info: Path) -> int | None:
    """Of Linux: what is free, and what the system would give up, like copies of files."""
    try:
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return int(lines["MemAvailable"].removesuffix("kB")) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_to_container(group: Path) -> int | None:
    """Of its limit (control groups, version 2 or 1), copies of files not counted as used; None: there is no limit."""
    for limit, current, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = int((group / limit).read_text()), int((group / current).read_text())
            lines = (group / limit).with_name("memory.stat").read_text().splitlines()
            return max(0, most - used + int(dict(line.split() for line in lines)[files]))
        except (OSError, KeyError, ValueError):  # "max" is no number
            continue
    return None
