"""Where Triton kernels can answer."""

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16, torch.float32)
meta_stands_for_a_gpu = False
"""True in a process that launches nothing and only asks which kernels would be launched (`compiling.py`)."""
_here = threading.local()


def fusible(*tensors: Tensor) -> bool:
    """Whether all tensors lie on a CUDA device in a type of at most 32 bits, and Triton is installed; not inside
    `without_kernels`.
    """
    return (
        not getattr(_here, "plain", False)
        and all(is_on_a_gpu(x) and x.dtype in TYPES for x in tensors)
        and triton_is_installed()
    )


def is_on_a_gpu(x: Tensor) -> bool:
    """Whether it is, or stands for one that is."""
    return x.is_cuda or (meta_stands_for_a_gpu and x.is_meta)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Lets plain PyTorch answer in this thread, as what kernels are compared with."""
    before, _here.plain = getattr(_here, "plain", False), True
    try:
        yield
    finally:
        _here.plain = before


@functools.cache
def triton_is_installed() -> bool:
    """The CUDA builds of PyTorch for Linux bring it."""
    return importlib.util.find_spec("triton") is not None
