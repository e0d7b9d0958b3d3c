"""A gated MLP with one set of weights per sequence: the MLP that learns while it reads.

reference.py   batched products around the gate, left to autograd
explicit.py    the same with the derivatives of the products written out; order 2
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from longread.ops.collective import enter, leave
from longread.ops.fast_mlp.explicit import explicit_fast_mlp, explicit_fast_mlp_of_halves
from longread.ops.swiglu import Activation


def fast_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation = "silu",
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """down · (s(gate · x) ∘ (up · x)), sequence by sequence.

    Args:
        x: [B, T, D]; its type is the type of the products.
        gate, up: [B, F, D] and
        down: [B, D, F]: the weights of each sequence.
        activation: s, as `longread.ops.swiglu.swiglu` names it.
        group: ranks that divide F and have the same x; the weights are this rank's part.

    Returns:
        [B, T, D] of the type of x, the same on all ranks of the group.
    """
    if group is None:
        return explicit_fast_mlp(x, gate, up, down, activation)
    return leave(explicit_fast_mlp(enter(x, group), gate, up, down, activation), group)


def fast_mlp_of_halves(
    x: Tensor, both: Tensor, down: Tensor, activation: Activation = "silu", *, group: ProcessGroup | None = None
) -> Tensor:
    """The same with gate and up in one tensor [B, 2F, D], the gate on top: fewer and wider products."""
    if group is None:
        return explicit_fast_mlp_of_halves(x, both, down, activation)
    return leave(explicit_fast_mlp_of_halves(enter(x, group), both, down, activation), group)
