"""Full attention over a context whose keys and values do not fit for all blocks at once: a block after the other.

To read without writing on, a block needs its input of all tokens and its own keys and values, and nothing of other
blocks. So a network is read whole in the memory of one block, and one block tells what all of them take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longread.model import Transformer
from longread.model.transformer import Block
from longread.ops.attention import attention

PIECE = 1 << 17
"""Tokens that go through everything but attention at a time."""
ADDRESSABLE = 2**31
"""Elements of a tensor that kernels with 32-bit offsets can reach."""


@torch.no_grad()
def read_by_block(model: Transformer, text: Tensor) -> Tensor:
    """The logits [B, V] of the last token of text [B, T], read by full attention in every block."""
    x = model.embed(text)
    for block in model.prefix:
        pass_block(model, block, x)
    return model.logits(model.final_norm(x[:, -1]))


@torch.no_grad()
def pass_block(model: Transformer, block: Block, x: Tensor) -> None:
    """Replaces a block's input [B, T, D] by its output: attention over all tokens by a few heads at a time."""
    B, T, _ = x.shape
    mixer = block.attention
    N, G, H = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    query, key, value = (x.new_empty(B, heads, T, H) for heads in (N, G, G))
    pieces = [slice(first, first + PIECE) for first in range(0, T, PIECE)]
    for piece in pieces:
        rotary = model.rotary(piece.start, x[:, piece])[block.rope]
        for whole, part in zip((query, key, value), mixer.heads(x[:, piece], rotary), strict=True):
            whole[:, :, piece] = part
    together = max(1, ADDRESSABLE // (B * T * H * N // G))  # heads of keys, with the queries that look at them
    for first in range(0, G, together):
        here = slice(first * N // G, (first + together) * N // G)
        shared = slice(first, first + together)
        query[:, here] = attention(
            query[:, here], key[:, shared], value[:, shared], window=None, order=0, soft_cap=mixer.soft_cap
        )
    for piece in pieces:
        x[:, piece] = block.static_mlp(mixer.joined(query[:, :, piece], x[:, piece]))
