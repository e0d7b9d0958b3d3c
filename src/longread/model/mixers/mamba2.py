"""Mamba 2 (arXiv 2405.21060): a convolution, then linear attention whose state decays, then a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longread.config import ModelConfig
from longread.model.layers import Linear, RMSNorm
from longread.model.mixers.recurrent import (
    Forgetting,
    RecurrentMixer,
    RecurrentState,
    ShortConvolution,
    initialize_convolution,
)
from longread.ops.ssd import ssd


class Mamba2(RecurrentMixer):
    """One sub-layer of Mamba 2: x + post_norm(output(norm(mixed ∘ silu(gate)))), in twice the width."""

    undecayed = ("skip",)

    def __init__(self, config: ModelConfig, pre_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        D, N, J = config.width, config.num_ssd_heads, config.ssd_state_size
        self.num_heads, self.widths = N, (2 * D, J, J)
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.input = Linear(D, 2 * D + sum(self.widths) + N)
        self.convolution = ShortConvolution(sum(self.widths))
        self.forgetting = Forgetting(N)
        self.skip = nn.Parameter(torch.ones(N))
        self.norm = RMSNorm(2 * D, config.norm_eps)
        self.output = Linear(2 * D, D)

    def forward(self, x: Tensor, past: RecurrentState, *, rotary: Tensor, order: int) -> tuple[Tensor, RecurrentState]:
        """Adds the sub-layer to x [B, T, D]; also returns the state after it. It needs no positions."""
        sizes = (self.widths[0], sum(self.widths), self.num_heads)
        gate, mixed, step = self.input(self.pre_norm(x)).split(sizes, dim=-1)
        mixed, recent = self.convolution(mixed, past.recent)
        value, key, query = mixed.split(self.widths, dim=-1)
        value = value.unflatten(-1, (self.num_heads, -1))
        step, log_decay = self.forgetting(step)
        found, memory = ssd(query, key, value * step.unsqueeze(-1).to(value.dtype), log_decay, past.memory)
        found = found + value * self.skip.to(value.dtype).unsqueeze(-1)
        out = self.output(self.norm(found.flatten(2) * F.silu(gate)))
        return self.post_norm(out, residual=x), RecurrentState(recent, memory)

    def empty_past(self, like: Tensor) -> RecurrentState:
        """The state of a sequence that begins, for a batch and type as `like` [B, ...]."""
        inner, J, _ = self.widths
        wide = torch.promote_types(like.dtype, torch.float32)
        memory = like.new_zeros(like.shape[0], self.num_heads, J, inner // self.num_heads, dtype=wide)
        return RecurrentState(self.convolution.empty_past(like), memory)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draws the convolution and how fast heads forget."""
        initialize_convolution(self.convolution, generator)
        self.forgetting.initialize(generator)
