"""The gated delta rule, the recurrence of Gated DeltaNet (arXiv 2412.06464, Eq. 10), with the state transposed.

    S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ   with S' = exp(a_t) S_{t-1}        o_t = S_tᵀ q_t

reference.py   token by token; the definition
chunked.py     some tokens at a time, as products and one triangular solve; any order of derivative
Kernels are those of flash-linear-attention (see `longread.ops.flash_linear_attention`), order 1.
"""

from torch import Tensor

from longread.ops import flash_linear_attention
from longread.ops.gated_delta_rule.chunked import chunked_gated_delta_rule


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Reads T tokens, differentiable once.

    Args:
        query, key: [B, T, N, J]; keys of length 1.
        value: [B, T, N, H].
        beta: how much of an old value is replaced, 0 to 1, [B, T, N].
        log_decay: a, at most 0, [B, T, N], float32 or wider.
        state: S before the first token, [B, N, J, H], float32 or wider.

    Returns:
        o [B, T, N, H] in the type of `value`, and S after the last token, [B, N, J, H].
    """
    if flash_linear_attention.answers(query, key, value):
        return flash_linear_attention.gated_delta_rule(query, key, value, beta, log_decay, state)
    return chunked_gated_delta_rule(query, key, value, beta, log_decay, state)
