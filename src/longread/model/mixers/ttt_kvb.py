"""TTT-KVB (paper section 2.4): a layer that learns, while it reads, to predict values from keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longread.config import ModelConfig
from longread.model.layers import Linear, NoNorm, RMSNorm
from longread.model.mixers.recurrent import RecurrentMixer
from longread.ops.key_value_binding import Memory, Waiting, key_value_binding


class BindingState(NamedTuple):
    """The state that later tokens need of earlier ones: fields as in `Memory` and `Waiting`."""

    gate: Tensor
    up: Tensor
    down: Tensor
    key: Tensor
    value: Tensor
    rate: Tensor


class KeyValueBinding(RecurrentMixer):
    """One sub-layer of key-value binding: x + post_norm(z). Each head's MLP begins with learned weights W_0."""

    def __init__(self, config: ModelConfig, pre_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        D, N, H, E = config.width, config.num_heads, config.head_dim, config.binding_hidden
        self.num_heads, self.binding, self.mini_batch_size = N, config.binding, config.mini_batch_size
        self.pre_norm, self.post_norm = pre_norm, post_norm

        def head_norm() -> nn.Module:
            return RMSNorm(H, config.norm_eps) if config.qk_norm else NoNorm()

        self.key, self.value, self.rate = Linear(D, D), Linear(D, D), Linear(D, N)
        self.key_norm = head_norm()
        if config.binding.output == "query":
            self.query, self.query_norm = Linear(D, D), head_norm()
        self.gate, self.up = (nn.Parameter(torch.empty(N, E, H)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(N, H, E))

    def forward(self, x: Tensor, past: BindingState, *, rotary: Tensor, order: int) -> tuple[Tensor, BindingState]:
        """Adds the sub-layer to x [B, T, D]; also returns the state after it. It needs no positions."""
        normed = self.pre_norm(x)
        key, query = self.key_norm(self._heads(self.key(normed))), None
        if self.binding.output == "query":
            query = self.query_norm(self._heads(self.query(normed)))
        new = Waiting(key, self._heads(self.value(normed)), self.rate(normed).sigmoid().transpose(1, 2))
        found, memory, waiting = key_value_binding(
            query,
            new,
            Memory(*past[:3]),
            Waiting(*past[3:]),
            mini_batch_size=self.mini_batch_size,
            lr=self.binding.lr,
            clip=self.binding.clip,
        )
        return self.post_norm(found.transpose(1, 2).flatten(2), residual=x), BindingState(*memory, *waiting)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, D] as [B, N, T, H]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def empty_past(self, like: Tensor) -> BindingState:
        """W_0 for every sequence of a batch, as views of the parameters, and no token that waits."""
        B, N, H = like.shape[0], self.num_heads, self.gate.shape[-1]
        wide = torch.promote_types(self.gate.dtype, torch.float32)
        gate, up, down = (w.to(wide).expand(B, -1, -1, -1) for w in (self.gate, self.up, self.down))
        none = like.new_empty(B, N, 0, H)
        return BindingState(gate, up, down, none, none, none[..., 0])

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draws W_0 at fan_in^-1/2: heads are narrow, and at less the gradient of their MLPs would vanish."""
        for weight in (self.gate, self.up, self.down):
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
