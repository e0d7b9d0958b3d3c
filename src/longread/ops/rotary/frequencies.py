"""How far each pair of a head turns per token: the rotary embedding's own angles, and those of stretched contexts."""

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """How a pretrained model reaches beyond its original context. The fields of `longread.config.RopeScaling`.

    Turns of a pair are its rotations within the original context, r = original_context · frequency / 2π.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    """A pair that is stretched fully turns this much more slowly; at least 1."""
    original_context: int | None = None
    """Tokens; "llama3" and "yarn" need it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: pairs of fewer turns than low are stretched fully, those of more turns than high not at all."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: the same borders, high and low; between them the stretch is linear in the index of the pair."""
    truncate: bool = True
    """yarn: the borders are rounded outwards to whole pairs."""


@functools.cache
def frequencies(
    head_dim: int, base: float, scaling: Scaling | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """base^(−2i / H) of each pair i (arXiv 2104.09864, section 3.4.2), stretched as `scaling` says.

    - "linear": every pair by the factor (arXiv 2306.15595).
    - "llama3": by parts, linear in the turns r, as released with Llama 3.1. It is NTK-by-parts of arXiv 2309.00071
      (section 3.2).
    - "yarn": by parts, linear in i. The text of arXiv 2309.00071 is linear in r; its released code, and so every model
      that was trained with it, in i. Its second half, larger scores, is `yarn_attention_factor`.

    Args:
        head_dim: H, even.
        device: where the tokens are.

    Returns:
        float64 [H/2], radians a token. Computed on the host and kept, so that a CUDA graph finds it where it was: a
        first call cannot be captured. Changed by nobody.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _on_the_host(head_dim, base, scaling).to(device or "cpu")


def _on_the_host(head_dim: int, base: float, scaling: Scaling | None) -> Tensor:
    pair = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float64)  # whatever device is the default
    plain = base ** (-pair / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.original_context is None:
        raise ValueError(f"original_context is missing; {scaling.kind} needs the context before stretching")
    if scaling.kind == "llama3":
        turns = plain * scaling.original_context / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = _yarn_borders(head_dim, base, scaling, scaling.original_context)
        kept = 1 - ((pair / 2 - first) / (last - first)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def _yarn_borders(head_dim: int, base: float, scaling: Scaling, context: int) -> tuple[float, float]:
    """Indices of the last pair that is not stretched and of the first one that is stretched fully, not always whole."""
    first, last = (
        head_dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(base))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The released code limits the upper border to H − 1, not to the last pair, H/2 − 1. Its results are the contract.
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last if last > first else first + 0.001


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """By how much yarn enlarges queries and keys, each: 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4).

    Scores grow by its square. `frequencies` does not contain it: it belongs into the weights.

    Args:
        mscale, mscale_all_dim: two weights of the logarithm, of which DeepSeek's models take the ratio; both or none.
    """

    def enlarged(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return enlarged(mscale) / enlarged(mscale_all_dim)
    return enlarged(1.0)
