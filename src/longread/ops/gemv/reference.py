"""Norms, products and gate one after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.rms_norm import Gain, rms_norm
from longread.ops.swiglu import Activation, swiglu


class Stream(NamedTuple):
    """A residual stream whose newest sub-layer has still to be added."""

    x: Tensor
    """[B, D]"""
    added: Tensor | None = None
    """[B, D]"""
    gain: Gain | None = None
    """The norm that `added` goes through first."""

    def sum(self) -> Tensor:
        """The stream with all added, [B, D]."""
        if self.added is None:
            return self.x
        return self.x + self.added if self.gain is None else rms_norm(self.added, *self.gain, residual=self.x)


def reference_entered(
    stream: Stream,
    weights: Sequence[Tensor],
    *,
    gain: Gain | None = None,
    biases: Sequence[Tensor] | None = None,
    gate: Activation | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The contract of `longread.ops.gemv.entered`."""
    x = stream.sum()
    normed = x if gain is None else rms_norm(x, *gain)
    wanted = zip(weights, [None] * len(weights) if biases is None else biases, strict=True)
    products = tuple(reference_gemv(normed, w, bias) for w, bias in wanted)
    return x, products if gate is None else (swiglu(products[0], products[1], gate),)


def reference_gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The contract of `longread.ops.gemv.gemv`, plus a bias [O]."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if weight.dim() == 2:
        out = F.linear(x, weight, bias)
    else:
        out = (x.unsqueeze(1) @ weight.mT).squeeze(1)
        out = out if bias is None else out + bias
    return out if dtype is None else out.to(dtype)
