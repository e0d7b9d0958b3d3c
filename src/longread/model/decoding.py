"""One new token of each sequence through the whole network, whose windows are rings that it changes.

What `Transformer.lower` and `upper` give, with fewer and longer kernels: there every norm, gate and product is one of
its own, and between short ones a GPU waits. Here a sub-layer leaves its output beside the residual stream, and the
first products of the next take both in (`longread.ops.gemv`). Only for attention as mixer, and without derivatives.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from longread.model.layers import MLP, RMSNorm, SwiGLU
from longread.model.mixers.attention import Attention, Ring
from longread.model.transformer import FastWeights, Frequencies, Transformer
from longread.ops.attention.ring import ring_attention
from longread.ops.gemv import Stream, entered, gemv
from longread.ops.rms_norm import Gain


def decode(
    model: Transformer,
    tokens: Tensor,
    fast: FastWeights,
    rings: Sequence[Ring],
    *,
    start: Tensor,
    frequencies: Frequencies | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads a token of each sequence.

    Args:
        tokens: int64 [B].
        fast: each sequence's own, in the type of the products.
        rings: one for each block, which take up the token.
        start: its position in each sequence, int64 [B].
        frequencies: `model.frequencies()`, for who decodes many tokens.

    Returns:
        the input of the lowest fast MLP (without any, of the final norm), and what the head turns into logits, [B, D].
    """
    stream, hidden, learning = Stream(model.embed(tokens)), None, iter(cast("tuple[SwiGLU, ...]", fast))
    rotary = model.rotary(start, stream.x.unsqueeze(1), frequencies)
    arrivals = torch.zeros(len(tokens) * model.config.num_heads, dtype=torch.int32, device=tokens.device)
    for block, ring in zip((*model.prefix, *model.suffix), rings, strict=True):
        stream = _attended(block.attention, stream, ring, rotary[block.rope], arrivals)
        if block.learns:
            stream = _transformed(block.fast_mlp, stream, next(learning))
            hidden = stream.x if hidden is None else hidden
        stream = _transformed(block.static_mlp, stream)
    x = stream.sum()
    return x if hidden is None else hidden, model.final_norm(x)


def _attended(attention: Attention, stream: Stream, ring: Ring, rotary: Tensor | None, arrivals: Tensor) -> Stream:
    """The stream after `Attention.forward`."""
    layers = attention.query, attention.key, attention.value
    biases = [layer.bias for layer in layers if layer.bias is not None]
    x, new = entered(stream, [layer.weight for layer in layers], gain=_gain(attention.pre_norm), biases=biases or None)
    norms = _gain(attention.query_norm), _gain(attention.key_norm)
    query, key, value = (y.unflatten(1, (-1, attention.head_dim)).unsqueeze(2) for y in new)
    mixed = ring_attention(
        query,
        key,
        value,
        ring[:2],
        ring.position,
        window=attention.window,
        soft_cap=attention.soft_cap,
        norms=None if norms[0] is None or norms[1] is None else (norms[0], norms[1]),
        rotary=rotary,
        arrivals=arrivals,
    )
    return Stream(x, gemv(mixed.flatten(1), attention.output.weight), _gain(attention.post_norm))


def _transformed(mlp: MLP, stream: Stream, fast: SwiGLU | None = None) -> Stream:
    """The stream after `MLP.forward`."""
    gate, up, down = fast or SwiGLU(mlp.gate.weight, mlp.up.weight, mlp.down.weight)
    x, (hidden,) = entered(stream, (gate, up), gain=_gain(mlp.pre_norm), gate=mlp.activation)
    return Stream(x, gemv(hidden, down), _gain(mlp.post_norm))


def _gain(norm: nn.Module) -> Gain | None:
    return Gain(norm.weight, norm.eps) if isinstance(norm, RMSNorm) else None
