"""Compiles the attention kernel for Hopper GPUs without one, and prints what ptxas says of it."""

from __future__ import annotations

import subprocess
import tempfile
from typing import Any

import torch

HOPPER = 90


def main() -> None:
    """In a process of its own: Triton is told of a GPU that is not there."""
    from triton import knobs
    from triton.runtime.driver import driver

    from longread.ops.attention.overlapped import overlapped_forward
    from longread.ops.compiling import NoDevice

    noted: list[Any] = []

    def note(*, key: Any, fn: Any, **facts: Any) -> bool:
        noted.append((fn.jit_function, facts["compile"]["specialization_data"]))
        return True

    driver.set_active(NoDevice(HOPPER))
    knobs.runtime.jit_cache_hook = note
    for H in (80, 96):
        q, k, v, *past = (
            torch.empty(1, n, 2, H, device="meta", dtype=torch.bfloat16).transpose(1, 2) for n in (512,) * 5
        )
        gain, lse = torch.empty(H, device="meta"), torch.empty(1, 2, 512, device="meta")
        overlapped_forward(q, k, v, (past[0], past[1]), 512, H**-0.5, (gain, gain), 60.0, torch.empty_like(q), lse)
    knobs.runtime.jit_cache_hook = None
    for function, data in noted:
        kernel = function.preload(data)
        with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
            file.write(kernel.asm["ptx"])
            file.flush()
            command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{HOPPER}a", file.name, "-o", "/dev/null"]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
