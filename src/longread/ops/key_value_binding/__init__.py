"""Key-value binding, the inner loop of a TTT-KVB layer (paper Eq. 7 to 9), in mini-batches of M tokens.

Each head has a small SwiGLU MLP g as its memory, with weights W of each sequence's own. Reading mini-batch i:

    ℓ_i = 1/M Σ_t r_t ‖g(k_t; W_{i-1}) − v_t‖²     r_t: the token's own rate         (Eq. 7)
    z_t = g(q_t; W_{i-1})   or   g(k_t; W_{i-1})                                     (Eq. 8 or 9)
    W_i = W_{i-1} − η · clip(∇ℓ_i)

so a token is answered by what was bound before its mini-batch, whose own tokens are left to attention (as in
arXiv 2505.23884, the implementation that the paper compares with). Nothing but k and v is needed for the step: it is
taken as soon as its M-th token is there.

reference.py   token by token, the gradient left to autograd; the definition
explicit.py    mini-batch by mini-batch, the gradient written out; order 1 of the layer is order 1 of autograd
"""

from typing import NamedTuple

from torch import Tensor

from longread.ops.key_value_binding.explicit import explicit_key_value_binding


class Memory(NamedTuple):
    """The weights that sequences have bound: gate and up [B, N, E, H], down [B, N, H, E], float32 or wider."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Waiting(NamedTuple):
    """The m < M tokens of an unfinished mini-batch: key and value [B, N, m, H], rate [B, N, m]."""

    key: Tensor
    value: Tensor
    rate: Tensor


def key_value_binding(
    query: Tensor | None,
    new: Waiting,
    memory: Memory,
    waiting: Waiting,
    *,
    mini_batch_size: int,
    lr: float,
    clip: float | None,
) -> tuple[Tensor, Memory, Waiting]:
    """Reads T tokens, differentiable once.

    Args:
        query: [B, N, T, H]; None: the keys are the queries (Eq. 9).
        new: keys, values and rates of the T tokens.
        memory: before the first of them.
        waiting: tokens before them whose mini-batch is not finished.
        lr, clip: η, and the largest norm of the gradient of one sequence, over all heads; None: no clipping.

    Returns:
        z [B, N, T, H] in the type of the keys, the memory, and the tokens that wait now.
    """
    found, weights, left = explicit_key_value_binding(
        query, new, memory, waiting, mini_batch_size=mini_batch_size, lr=lr, clip=clip
    )
    return found, Memory(*weights), Waiting(*left)
