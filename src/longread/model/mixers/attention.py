"""Multi-head causal attention with a cached past: windowed or full, rotary, with normed queries and keys."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longread.config import ModelConfig
from longread.model.layers import Linear, RMSNorm
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


def rotation(start: int, length: int, head_dim: int, base: float, like: Tensor) -> Tensor:
    """The rotary embedding (arXiv 2104.09864) at positions start … start + T − 1, as unit complex numbers [T, H/2].

    Angles are float64 until the last moment: at position 10⁶ a float32 angle is already wrong by 0.06 rad.
    """
    pair = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float64)
    positions = torch.arange(start, start + length, device=like.device, dtype=torch.float64)
    turned = torch.polar(torch.ones_like(pair), positions[:, None] * base ** (-pair / head_dim))
    return turned if like.dtype == torch.float64 else turned.to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turns each pair (x[2i], x[2i+1]) of x [..., T, H] by its angle."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """One attention sub-layer: x + post_norm(output(attend(pre_norm(x))))."""

    def __init__(self, config: ModelConfig, window: int | None, pre_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        D, H = config.width, config.head_dim
        self.window, self.num_heads, self.head_dim, self.rope_base = window, config.num_heads, H, config.rope_base
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.query, self.key, self.value, self.output = (Linear(D, D) for _ in range(4))
        self.query_norm, self.key_norm = (
            RMSNorm(H, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, past: Past, *, start: int, order: int) -> tuple[Tensor, Past]:
        """Adds the sub-layer to x.

        Args:
            x: [B, T, D], tokens at positions start … start + T − 1.
            past: what came before; only its newest window − 1 tokens are looked at.
            order: order of derivative that will be taken (see `longread.ops.attention`).

        Returns:
            [B, T, D], and the past with the new tokens appended, untrimmed.
        """
        normed = self.pre_norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        turn = rotation(start, x.shape[1], self.head_dim, self.rope_base, x)
        query, key = rotate(self.query_norm(query), turn), rotate(self.key_norm(key), turn)
        mixed = attention(query, key, value, past=past, window=self.window, order=order)
        grown = Past(*(torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True)))
        return x + self.post_norm(self.output(mixed.transpose(1, 2).flatten(2))), grown

    def empty_past(self, like: Tensor) -> Past:
        """The past of a sequence that begins, for a batch and type as `like` [B, ...]."""
        empty = like.new_empty(like.shape[0], self.num_heads, 0, self.head_dim)
        return Past(empty, empty)
