"""Whether overlapped.py answers: on a Hopper GPU, where Triton brings its language and it computes what it should."""

import importlib.util
import math
import warnings

import torch
from torch import Tensor

from longread.ops.attention.reference import reference_attention, visible
from longread.ops.fusible import is_on_a_gpu

CAPABILITY = 90
TOLERANCE = 0.02
"""Of the difference from plain PyTorch in float32: of the norm of the output, and of a log-sum-exp."""
_FOUND: dict[tuple[torch.device, torch.dtype, int, int, torch.dtype], bool] = {}


def overlaps(query: Tensor, key: Tensor, gain: Tensor) -> bool:
    """Whether `overlapped_forward` takes queries [B, N, T, H] with keys [B, G, T, H] and gains of norms like `gain`.

    The first of each kind on a device are compared with plain PyTorch on a small problem; where they differ, or nothing
    can be compiled, there is a warning, and the answer is no from then on. While a CUDA graph is captured nothing can
    be compared: until then it is no, too.
    """
    if not 64 < query.shape[-1] <= 96 or query.dtype != torch.bfloat16:
        return False
    if not is_on_a_gpu(query):
        return False
    if query.is_meta:
        return _is_hopper()
    group = query.shape[1] // key.shape[1]
    kind = query.device, query.dtype, query.shape[-1], group, gain.dtype
    if kind not in _FOUND:
        if torch.cuda.is_current_stream_capturing():
            return False
        _FOUND[kind] = _is_hopper() and _is_right(query, group, gain.dtype)
    return _FOUND[kind]


def _is_hopper() -> bool:
    from triton.runtime.driver import driver

    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch == CAPABILITY)


def _is_right(like: Tensor, group: int, gain_dtype: torch.dtype) -> bool:
    try:
        off = _difference(like, group, gain_dtype)
    except Exception as error:  # it may be whatever a compiler raises
        why = f"fails here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    else:
        if off <= TOLERANCE:
            return True
        why = f"is {off:.2g} off on {torch.cuda.get_device_name(like.device)}"
    warnings.warn(f"the attention kernel for Hopper GPUs {why}; attention goes on without it", stacklevel=2)
    return False


@torch.no_grad()
def _difference(like: Tensor, group: int, gain_dtype: torch.dtype) -> float:
    """Over blocks that are seen whole, that the window cuts, and that are partly still to come."""
    from longread.ops.attention.overlapped import overlapped_forward

    T, P, window, H = 384, 192, 256, like.shape[-1]
    row = -(-H // 8) * 8
    generator = torch.Generator(like.device).manual_seed(0)

    def drawn(heads: int, tokens: int) -> Tensor:
        x = torch.randn(1, tokens, heads, row, generator=generator, device=like.device, dtype=torch.float32)
        return x.mul_(x.square().mean(-1, keepdim=True).rsqrt_()).to(like.dtype).transpose(1, 2)[..., :H]

    query, key, value, *past = drawn(group, T), drawn(1, T), drawn(1, T), drawn(1, P), drawn(1, P)
    gain, scale = torch.full((H,), math.sqrt(row / H), device=like.device, dtype=gain_dtype), H**-0.5
    out = torch.empty_strided(query.shape, query.stride(), device=like.device, dtype=like.dtype)
    lse = torch.empty(1, group, T, device=like.device)
    overlapped_forward(query, key, value, (past[0], past[1]), window, scale, (gain, gain), math.inf, out, lse)
    wide = [x.float() for x in (query, key, value, *past)]
    exact = reference_attention(*wide[:3], past=(wide[3], wide[4]), window=window)
    scores = wide[0] @ torch.cat((wide[3], wide[1]), 2).mT * scale
    hidden = ~visible(T, P + T, window, like.device)
    exact_lse = scores.masked_fill_(hidden, -math.inf).logsumexp(-1) / math.log(2)
    off = torch.stack(((out - exact).norm() / exact.norm(), (lse - exact_lse).abs().max()))
    return off.max().item()
