"""Gated DeltaNet (arXiv 2412.06464): a memory that forgets, and replaces what it holds for a key."""

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
from longread.ops.gated_delta_rule import gated_delta_rule

_LENGTH_EPS = 1e-6


class GatedDeltaNet(RecurrentMixer):
    """One sub-layer of Gated DeltaNet: x + post_norm(output(norm(found) ∘ silu(gate))).

    Its keys are 3/4 D wide, its values 3/2 D, over all heads.
    """

    def __init__(self, config: ModelConfig, pre_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        D, N = config.width, config.num_delta_heads
        self.num_heads, self.widths = N, (3 * D // 4, 3 * D // 4, 3 * D // 2)
        values = self.widths[2]
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.input = Linear(D, sum(self.widths) + values + 2 * N)
        self.convolution = ShortConvolution(sum(self.widths))
        self.forgetting = Forgetting(N)
        self.norm = RMSNorm(values // N, config.norm_eps)
        self.output = Linear(values, D)

    def forward(self, x: Tensor, past: RecurrentState, *, rotary: Tensor, order: int) -> tuple[Tensor, RecurrentState]:
        """Adds the sub-layer to x [B, T, D]; also returns the state after it. It needs no positions."""
        sizes = (sum(self.widths), self.widths[2], self.num_heads, self.num_heads)
        mixed, gate, beta, step = self.input(self.pre_norm(x)).split(sizes, dim=-1)
        mixed, recent = self.convolution(mixed, past.recent)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in mixed.split(self.widths, dim=-1))
        _, log_decay = self.forgetting(step)
        query = _of_length_one(query) * query.shape[-1] ** -0.5
        found, memory = gated_delta_rule(query, _of_length_one(key), value, beta.sigmoid(), log_decay, past.memory)
        out = self.output(self.norm(found).flatten(2) * F.silu(gate))
        return self.post_norm(out, residual=x), RecurrentState(recent, memory)

    def empty_past(self, like: Tensor) -> RecurrentState:
        """The state of a sequence that begins, for a batch and type as `like` [B, ...]."""
        J, _, H = (width // self.num_heads for width in self.widths)
        wide = torch.promote_types(like.dtype, torch.float32)
        memory = like.new_zeros(like.shape[0], self.num_heads, J, H, dtype=wide)
        return RecurrentState(self.convolution.empty_past(like), memory)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draws the convolution and how fast heads forget."""
        initialize_convolution(self.convolution, generator)
        self.forgetting.initialize(generator)


def _of_length_one(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + _LENGTH_EPS).rsqrt()).to(x.dtype)
