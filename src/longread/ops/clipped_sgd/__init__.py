"""One step of clipped SGD per sequence, the update of the inner loop (paper Eq. 2), differentiable once.

reference.py   the definition
explicit.py    the same with its derivative written out; finite at a zero gradient
"""

from collections.abc import Sequence

from torch import Tensor

from longread.ops.clipped_sgd.explicit import explicit_clipped_sgd


def clipped_sgd(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float, clip: float | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """W − lr · min(1, clip / ‖g‖) · g, with one norm per sequence over all its weights.

    Args:
        weights, gradients: as many tensors of the same shapes [B, ...].
        lr: step size.
        clip: largest norm; None: no clipping.

    Returns:
        The new weights, and the norms before clipping, [B], which take no part in differentiation.
    """
    return explicit_clipped_sgd(weights, gradients, lr=lr, clip=clip)
