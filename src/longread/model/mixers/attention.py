"""Causal attention with a cached past: windowed or full, rotary, queries in groups that share their keys and values."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longread.config import ModelConfig
from longread.model.layers import Linear, NoNorm, Norm, RMSNorm, product_of_all
from longread.ops.attention import Further, attention


class Past(NamedTuple):
    """Keys (rotated) and values of earlier tokens, oldest first: each [B, G, P, H], G heads of keys and values."""

    key: Tensor
    value: Tensor

    def last(self, tokens: int | None) -> "Past":
        """The newest `tokens` of it, or all."""
        return self if tokens is None else Past(*(x[:, :, max(0, x.shape[2] - tokens) :] for x in self))

    def followed_by(self, own: "Past", keep: int | None) -> "Past":
        """The newest `keep` tokens (None: all) of this past and the tokens that came after it."""
        older = self.last(None if keep is None else max(0, keep - own.key.shape[2]))
        if not older.key.shape[2]:
            return own.last(keep)
        return Past(*(torch.cat(pair, dim=2) for pair in zip(older, own, strict=True)))

    def before(self, tokens: int) -> "Past":
        """All but the newest `tokens` of it."""
        return Past(*(x[:, :, : x.shape[2] - tokens] for x in self))

    def detach(self) -> "Past":
        return Past(self.key.detach(), self.value.detach())


class LongPast(NamedTuple):
    """A past, and beside it older tokens that each token sees or does not."""

    near: Past
    further: Further


class Ring(NamedTuple):
    """A past that decoding changes in place: token p lies in slot p mod R."""

    key: Tensor
    """[B, G, R, H]"""
    value: Tensor
    position: Tensor
    """Of the next token, int64 [B]."""

    def put(self, past: Past, position: int) -> None:
        """Takes over the past of a token at `position`."""
        for place, x in zip(self[:2], past, strict=True):
            place.index_copy_(2, self._slots(x.shape[2], position), x)

    def take(self, tokens: int, position: int) -> Past:
        """The past of a token at `position`, so many tokens long."""
        return Past(*(place.index_select(2, self._slots(tokens, position)) for place in self[:2]))

    def _slots(self, tokens: int, position: int) -> Tensor:
        return torch.arange(position - tokens, position, device=self.key.device).remainder(self.key.shape[2])


class Attention(nn.Module):
    """One attention sub-layer: x + post_norm(output(attend(pre_norm(x))))."""

    def __init__(self, config: ModelConfig, window: int | None, pre_norm: Norm, post_norm: Norm) -> None:
        super().__init__()
        D, H, queries = config.width, config.head_dim, config.num_heads * config.head_dim
        self.window, self.num_heads, self.head_dim = window, config.num_heads, H
        self.num_kv_heads, self.soft_cap = config.num_kv_heads, config.attention_soft_cap
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.query = Linear(D, queries, bias=config.qkv_bias)
        self.key, self.value = (Linear(D, config.kv_width, bias=config.qkv_bias) for _ in range(2))
        self.output = Linear(queries, D)
        self.query_norm, self.key_norm = (RMSNorm(H, config.norm_eps) if config.qk_norm else NoNorm() for _ in range(2))

    def extra_repr(self) -> str:
        heads = f"{self.num_heads} heads"
        if self.num_kv_heads < self.num_heads:
            heads += f" over {self.num_kv_heads} of keys and values"
        return f"{heads}, {'full' if self.window is None else f'window {self.window:,}'}"

    def forward(self, x: Tensor, past: Past | LongPast, *, rotary: Tensor | None, order: int) -> tuple[Tensor, Past]:
        """Adds the sub-layer to x.

        Args:
            x: [B, T, D]
            past: what came before; only its newest window − 1 tokens are looked at, and what lies beside it.
            rotary: the embedding of the tokens' positions, [T, H/2] or [B, 1, T, H/2] (see `longread.ops.rotary`);
                None: this block has none.
            order: order of derivative that will be taken (see `longread.ops.attention`).

        Returns:
            [B, T, D], and the tokens' own keys and values.
        """
        normed, x = self.pre_norm.and_input(x)
        query, key, value = self._heads(normed, rotary)
        near, further = past if isinstance(past, LongPast) else (past, None)
        mixed = attention(
            query,
            key,
            value,
            past=near,
            window=self.window,
            order=order,
            gains=self._gains,
            soft_cap=self.soft_cap,
            further=further,
        )
        return self.joined(mixed, x), Past(key, value)

    def heads(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, T, H], keys and values [B, G, T, H] of x [B, T, D], as `attention` takes them in."""
        return self._heads(self.pre_norm(x), rotary)

    def _heads(self, normed: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self._products(normed))
        return self.query_norm(query, rotary=rotary), self.key_norm(key, rotary=rotary), value

    def joined(self, mixed: Tensor, x: Tensor) -> Tensor:
        """x [B, T, D] with the heads' results [B, N, T, H] added."""
        return self.post_norm(self.output(mixed.transpose(1, 2).flatten(2)), residual=x)

    def _products(self, normed: Tensor) -> tuple[Tensor, ...]:
        layers = self.stacks[0]
        together = product_of_all(layers, normed)
        if together is None:
            return tuple(layer(normed) for layer in layers)
        return together.split([len(layer.weight) for layer in layers], dim=-1)

    @property
    def stacks(self) -> tuple[tuple[Linear, ...], ...]:
        """Its layers; those that multiply the same vectors together."""
        return (self.query, self.key, self.value), (self.output,)

    @property
    def _gains(self) -> tuple[Tensor, Tensor] | None:
        query, key = self.query_norm, self.key_norm
        return (query.weight, key.weight) if isinstance(query, RMSNorm) and isinstance(key, RMSNorm) else None

    def empty_past(self, like: Tensor) -> Past:
        """The past of a sequence that begins, for a batch and type as `like` [B, ...]."""
        empty = like.new_empty(like.shape[0], self.num_kv_heads, 0, self.head_dim)
        return Past(empty, empty)
