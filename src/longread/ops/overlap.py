"""Kernels that begin before the one before them has ended (programmatic dependent launch; Hopper and later).

Such a kernel asks for what no kernel beside it writes, its weights, and waits only before it reads or writes anything
else. Each waits for the end of the one before, which waited itself: so all that came earlier has ended too.
"""

from torch import Tensor

from longread.ops.fusible import capability, is_on_a_gpu

OVERLAP = False
"""Whether kernels that can do it are launched so."""


def overlaps(x: Tensor) -> bool:
    """Whether kernels on the device of x are."""
    return OVERLAP and is_on_a_gpu(x) and capability(x) >= (9, 0)
