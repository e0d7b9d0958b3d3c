"""The rotary embedding as its definition says: complex products."""

import torch
from torch import Tensor


def rotation(start: int | Tensor, length: int, frequencies: Tensor, like: Tensor) -> Tensor:
    """The rotary embedding (arXiv 2104.09864) at positions start … start + T − 1, as unit complex numbers.

    Angles are float64 until the last moment: at position 10⁶ a float32 angle is already wrong by 0.06 rad.

    Args:
        start: a number, a tensor [], or [B] where each sequence has its own.
        frequencies: float64 [H/2], radians a token, from `frequencies`; on the device of `like`.

    Returns:
        [T, H/2], or [B, 1, T, H/2]: all heads of a sequence share it.
    """
    positions = torch.arange(length, device=like.device, dtype=torch.float64)
    if isinstance(start, Tensor) and start.dim():
        start = start[:, None, None]
    turned = torch.polar(torch.ones_like(frequencies), (start + positions)[..., None] * frequencies)
    return turned if like.dtype == torch.float64 else turned.to(torch.complex64)


def reference_rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """The contract of `longread.ops.rotary.rotate`, left to autograd at every order."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)
