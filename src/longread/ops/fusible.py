"""Where Triton kernels can answer."""

import functools
import importlib.util

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def fusible(*tensors: Tensor) -> bool:
    """Whether all tensors lie on a CUDA device in a type of at most 32 bits, and Triton is installed."""
    return all(x.is_cuda and x.dtype in TYPES for x in tensors) and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
