"""The kernels of flash-linear-attention (package `fla-core`), behind the contracts of our own recurrences.

They answer on a GPU in half precision, where the package is installed; without it the chunked implementations do. Where
some compilers would make their gradients wrong, they are used for reading only.
Layouts agree: [B, T, N, ...], and states [B, N, J, H] in float32. Ours have no scale, so theirs is 1.
"""

import functools
import importlib.metadata
import importlib.util
import re
import warnings

import torch
from torch import Tensor

from longread.ops.fusible import fusible

LARGEST_KEY = 256
FEW_TOKENS = 64
"""Up to so many, where no gradient is wanted, a kernel that goes token by token is faster than chunks."""


def answers(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels can take these."""
    if not fusible(query, key, value) or value.dtype == torch.float32:
        return False
    if not value.shape[1] or key.shape[-1] > LARGEST_KEY or not _is_installed():
        return False
    return not torch.is_grad_enabled() or _gradients_are_right(torch.cuda.get_device_capability(value.device))


def ssd(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.ssd.ssd`."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla  # type: ignore[import-not-found]

    N = value.shape[2]
    query, key = (x.unsqueeze(2).expand(-1, -1, N, -1).contiguous() for x in (query, key))
    kernel = fused_recurrent_simple_gla if _token_by_token(value) else chunk_simple_gla
    return kernel(
        query,
        key,
        value.contiguous(),
        g=log_decay.float().contiguous(),
        scale=1.0,
        initial_state=state.float().contiguous(),
        output_final_state=True,
    )


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.gated_delta_rule.gated_delta_rule`."""
    from fla.ops.gated_delta_rule import (  # type: ignore[import-not-found]
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
    )

    kernel = fused_recurrent_gated_delta_rule if _token_by_token(value) else chunk_gated_delta_rule
    return kernel(
        q=query.contiguous(),
        k=key.contiguous(),
        v=value.contiguous(),
        g=log_decay.float().contiguous(),
        beta=beta.contiguous(),
        scale=1.0,
        initial_state=state.float().contiguous(),
        output_final_state=True,
    )


def _token_by_token(value: Tensor) -> bool:
    return value.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()


@functools.cache
def _is_installed() -> bool:
    if importlib.util.find_spec("fla") is not None:
        return True
    warnings.warn(
        "recurrent mixers run without kernels, which is slower; run pip install fla-core",
        stacklevel=2,
    )
    return False


@functools.cache
def _gradients_are_right(capability: tuple[int, int]) -> bool:
    """False where Triton miscompiles gated gradients (https://github.com/fla-org/flash-linear-attention/issues/640)."""
    triton = importlib.metadata.version("triton")
    numbers = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    if capability[0] != 9 or not (3, 4) <= numbers < (3, 7, 1):
        return True
    warnings.warn(
        f"recurrent mixers train without kernels, which is slower: on this GPU those need Triton 3.7.1, not {triton}",
        stacklevel=2,
    )
    return False
