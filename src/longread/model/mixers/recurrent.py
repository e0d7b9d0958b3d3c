"""The common parts of recurrent mixers: their interface, a short convolution with a past, and forgetting."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longread.config import CONVOLUTION_WIDTH

FASTEST_DECAY = 16.0
STEPS = 0.001, 0.1
"""Between which initial step sizes are drawn."""


class RecurrentMixer(nn.Module):
    """A mixer whose past is a state of constant size, a NamedTuple of tensors [B, ...].

    It is called like `Attention`; what it returns beside its output is the state after the last token.
    """

    undecayed: tuple[str, ...] = ()
    """Own parameters that weight decay would pull to no meaningful value."""

    def empty_past(self, like: Tensor) -> Any:
        """The state of a sequence that begins, for a batch and type as `like` [B, ...]."""
        raise TypeError(f"{type(self).__name__} does not say what its state is")

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draws the parameters that are not matrices or gains like all others."""


class RecurrentState(NamedTuple):
    """The state that later tokens need of earlier ones."""

    recent: Tensor
    """Input of the convolution for the newest tokens, [B, CONVOLUTION_WIDTH − 1, channels]."""
    memory: Tensor
    """[B, N, J, H], float32 or wider."""


class ShortConvolution(nn.Module):
    """silu of a causal convolution over a few tokens, each channel for itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, CONVOLUTION_WIDTH))

    def forward(self, x: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, channels] and the tokens before, [B, CONVOLUTION_WIDTH − 1, channels]; returns the same."""
        padded, T = torch.cat((recent, x), dim=1), x.shape[1]
        taps = self.weight.to(x.dtype).unbind(1)
        mixed = sum((padded[:, i : i + T] * tap for i, tap in enumerate(taps)), torch.zeros_like(x))
        return F.silu(mixed), padded[:, T:]

    def empty_past(self, like: Tensor) -> Tensor:
        """Nothing before the first token."""
        return like.new_zeros(like.shape[0], CONVOLUTION_WIDTH - 1, self.weight.shape[0])


class Forgetting(nn.Module):
    """Step sizes Δ and log decays −A Δ of Mamba 2 (arXiv 2405.21060), per token and head."""

    undecayed = ("log_rate", "step_bias")

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.log_rate, self.step_bias = (nn.Parameter(torch.empty(num_heads)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, T, N], float32 or wider, from x [B, T, N]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(x.to(wide) + self.step_bias.to(wide))
        return step, -self.log_rate.to(wide).exp() * step

    def initialize(self, generator: torch.Generator | None) -> None:
        """A between 1 and 16, and Δ, of a token that asks for nothing else, log-uniform between 0.001 and 0.1."""
        rate, step = (torch.empty_like(self.log_rate).uniform_(generator=generator) for _ in range(2))
        self.log_rate.copy_((1 + rate * (FASTEST_DECAY - 1)).log())
        low, high = map(math.log, STEPS)
        step = (low + step * (high - low)).exp()
        self.step_bias.copy_(step + (-torch.expm1(-step)).log())  # its softplus is the step


def initialize_convolution(convolution: ShortConvolution, generator: torch.Generator | None) -> None:
    """Draws the taps at (their number)^-1/2, whatever the standard deviation of matrices is."""
    convolution.weight.normal_(std=CONVOLUTION_WIDTH**-0.5, generator=generator)
