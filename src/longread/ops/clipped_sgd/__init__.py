"""One step of clipped SGD per sequence, the update of the inner loop (paper Eq. 2), differentiable once.

reference.py   the definition
explicit.py    the same with its derivative written out; finite at a zero gradient
triton.py      the same in as few passes over memory as there can be
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longread.ops.clipped_sgd.explicit import explicit_clipped_sgd, refused
from longread.ops.fusible import TYPES, fusible

__all__ = ["clipped_sgd", "clipped_sgd_", "clipped_sgd_and_cast", "refused"]


def clipped_sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    clip: float | None,
    max_step_norm: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """W − lr · min(1, clip / ‖g‖) · g, with one norm per sequence over all its weights.

    Args:
        weights, gradients: as many tensors of the same shapes [B, ...].
        lr: step size; a tensor [] where it must not be fixed in a CUDA graph. It takes no gradient.
        clip: largest norm; None: no clipping.
        max_step_norm: a guard, [] in float32 or wider: a sequence whose step would be longer, or whose gradient is not
            finite, keeps its weights (see `refused`). None: every step is taken. Not to be differentiated.
        group: ranks that divide the weights of each sequence; the norm is that over the parts of all.

    Returns:
        The new weights, and the norms before clipping, [B], which take no part in differentiation.
    """
    if fusible(*weights, *gradients):
        from longread.ops.clipped_sgd.triton import triton_clipped_sgd

        return triton_clipped_sgd(weights, gradients, lr=lr, clip=clip, max_step_norm=max_step_norm, group=group)
    return explicit_clipped_sgd(weights, gradients, lr=lr, clip=clip, max_step_norm=max_step_norm, group=group)


def clipped_sgd_and_cast(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    lr: float | Tensor,
    clip: float | None,
    group: ProcessGroup | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The same step, and the new weights once more in another type, that of the products; differentiable in both.

    Returns:
        The new weights, the same in `dtype`, and the norms before clipping, [B].
    """
    if fusible(*weights, *gradients) and dtype in TYPES:
        from longread.ops.clipped_sgd.triton import triton_clipped_sgd_and_cast

        return triton_clipped_sgd_and_cast(weights, gradients, dtype, lr=lr, clip=clip, group=group)
    new, norm = explicit_clipped_sgd(weights, gradients, lr=lr, clip=clip, group=group)
    return new, tuple(w.to(dtype) for w in new), norm


def clipped_sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    working: Sequence[Tensor],
    *,
    lr: float | Tensor,
    clip: float | None,
    max_step_norm: Tensor | None = None,
) -> Tensor:
    """The same step in place, where nothing will be differentiated.

    Args:
        weights: contiguous; they become the new weights.
        working: contiguous; they become the same in their own type, that of the products.

    Returns:
        the norms before clipping, [B].
    """
    if fusible(*weights, *gradients, *working):
        from longread.ops.clipped_sgd.triton import triton_clipped_sgd_

        return triton_clipped_sgd_(weights, gradients, working, lr=lr, clip=clip, max_step_norm=max_step_norm)
    stepped, norm = explicit_clipped_sgd(weights, gradients, lr=lr, clip=clip, max_step_norm=max_step_norm)
    for weight, copy, new in zip(weights, working, stepped, strict=True):
        weight.copy_(new)
        copy.copy_(new)
    return norm
