"""Multi-head causal attention with a cached past: windowed or full, rotary, with normed queries and keys."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longread.config import ModelConfig
from longread.model.layers import Linear, NoNorm, RMSNorm
from longread.ops.attention import attention


class Past(NamedTuple):
    """Keys (rotated) and values of earlier tokens, oldest first: each [B, N, P, H]."""

    key: Tensor
    value: Tensor

    def last(self, tokens: int | None) -> "Past":
        """The newest `tokens` of it, or all."""
        return self if tokens is None else Past(*(x[:, :, max(0, x.shape[2] - tokens) :] for x in self))

    def before(self, tokens: int) -> "Past":
        """All but the newest `tokens` of it."""
        return Past(*(x[:, :, : x.shape[2] - tokens] for x in self))

    def detach(self) -> "Past":
        return Past(self.key.detach(), self.value.detach())


class Attention(nn.Module):
    """One attention sub-layer: x + post_norm(output(attend(pre_norm(x))))."""

    def __init__(self, config: ModelConfig, window: int | None, pre_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        D, H = config.width, config.head_dim
        self.window, self.num_heads, self.head_dim = window, config.num_heads, H
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.query, self.key, self.value, self.output = (Linear(D, D) for _ in range(4))
        self.query_norm, self.key_norm = (RMSNorm(H, config.norm_eps) if config.qk_norm else NoNorm() for _ in range(2))

    def forward(self, x: Tensor, past: Past, *, turn: Tensor, order: int) -> tuple[Tensor, Past]:
        """Adds the sub-layer to x.

        Args:
            x: [B, T, D]
            past: what came before; only its newest window − 1 tokens are looked at.
            turn: the rotary embedding of the tokens' positions, [T, H/2] (see `longread.ops.rotary`).
            order: order of derivative that will be taken (see `longread.ops.attention`).

        Returns:
            [B, T, D], and the past with the new tokens appended, untrimmed.
        """
        normed = self.pre_norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self.query_norm(query, turn=turn), self.key_norm(key, turn=turn)
        mixed = attention(query, key, value, past=past, window=self.window, order=order)
        if past.key.shape[2]:
            key, value = torch.cat((past.key, key), dim=2), torch.cat((past.value, value), dim=2)
        return self.post_norm(self.output(mixed.transpose(1, 2).flatten(2)), residual=x), Past(key, value)

    def empty_past(self, like: Tensor) -> Past:
        """The past of a sequence that begins, for a batch and type as `like` [B, ...]."""
        empty = like.new_empty(like.shape[0], self.num_heads, 0, self.head_dim)
        return Past(empty, empty)
