"""State-space duality, the recurrence of Mamba 2 (arXiv 2405.21060): linear attention whose state decays.

    S_t = exp(a_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t

In the names of that paper, q is C, k is B, v is Δ x, and a is Δ A.

reference.py   token by token; the definition
chunked.py     some tokens at a time, as products; any order of derivative
Kernels are those of flash-linear-attention (see `longread.ops.flash_linear_attention`), order 1.
"""

from torch import Tensor

from longread.ops import flash_linear_attention
from longread.ops.ssd.chunked import chunked_ssd


def ssd(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Reads T tokens, differentiable once.

    Args:
        query, key: [B, T, J], the same for all N heads.
        value: [B, T, N, H].
        log_decay: a, at most 0, [B, T, N], float32 or wider.
        state: S before the first token, [B, N, J, H], float32 or wider.

    Returns:
        o [B, T, N, H] in the type of `value`, and S after the last token, [B, N, J, H].
    """
    if flash_linear_attention.answers(query, key, value):
        return flash_linear_attention.ssd(query, key, value, log_decay, state)
    return chunked_ssd(query, key, value, log_decay, state)
