"""TTT-E2E in one file: every formula of the paper in plain PyTorch, and autograd for the rest.

`end_to_end_losses` is the method. It goes over a sequence mini-batch by mini-batch: each is scored with fast weights,
and one step of clipped SGD on its loss makes new ones. The graph of all steps is kept, so the mean of the losses can be
differentiated: that is meta-training. Without the graph (`create_graph=False`) the same loop is reading.

It shares nothing with the library but configs and the names of the parameters. Tests take it as the hand-written unroll
of the inner loop; benchmarks as the naive peer that every user could have had: dense masks, the whole suffix inside the
loop, no recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longread.config import ModelConfig, RopeScaling

State = Mapping[str, Tensor]
Weights = list[list[Tensor]]
Caches = list[tuple[Tensor, Tensor] | None]


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return x if gain is None else gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def frequency(pair: int, H: int, base: float, scaling: RopeScaling | None) -> float:
    """Radians a token by which a pair of a head turns, stretched as pretrained models do."""
    plain = base ** (-2 * pair / H)
    if scaling is None:
        return plain
    stretched, turns = plain / scaling.factor, (scaling.original_context or 0) * plain / (2 * math.pi)
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "llama3":
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:  # the pairs that turn so often in the original context
        fast, slow = (
            H * math.log((scaling.original_context or 0) / (b * 2 * math.pi)) / (2 * math.log(base))
            for b in (scaling.beta_fast, scaling.beta_slow)
        )
        fast, slow = (math.floor(fast), math.ceil(slow)) if scaling.truncate else (fast, slow)
        fast, slow = max(fast, 0), min(slow, H - 1)
        share = 1 - (pair - fast) / (slow - fast if slow > fast else 0.001)
    share = min(1.0, max(0.0, share))
    return share * plain + (1 - share) * stretched


def rotate(x: Tensor, positions: Tensor, c: ModelConfig, block: int) -> Tensor:
    """x [B, T, N, H]: interleaved pairs."""
    kind = c.rope_of(block)
    if kind == "none":
        return x
    H, pairs = x.shape[-1], range(x.shape[-1] // 2)
    base, scaling = (c.local_rope_base, None) if kind == "local" else (c.rope_base, c.rope_scaling)
    frequencies = torch.tensor([frequency(i, H, base, scaling) for i in pairs], dtype=x.dtype)
    angle = positions[:, None].to(x.dtype) * frequencies
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attention(p: State, block: str, x: Tensor, cache: tuple[Tensor, Tensor] | None, start: int, c: ModelConfig):  # type: ignore[no-untyped-def]
    """Adds the attention sub-layer; returns the keys and values seen so far."""
    B, T, _ = x.shape
    name, index = f"{block}.attention", int(block.split(".")[1])
    window = c.window_of(index)
    h = rms_norm(x, p.get(f"{name}.pre_norm.weight"), c.norm_eps)
    q, k, v = (
        (h @ p[f"{name}.{m}.weight"].t() + p.get(f"{name}.{m}.bias", 0)).view(B, T, -1, c.head_dim)
        for m in ("query", "key", "value")
    )
    positions = torch.arange(start, start + T)
    q = rotate(rms_norm(q, p.get(f"{name}.query_norm.weight"), c.norm_eps), positions, c, index)
    k = rotate(rms_norm(k, p.get(f"{name}.key_norm.weight"), c.norm_eps), positions, c, index)
    if cache is not None:
        k, v = torch.cat((cache[0], k), 1), torch.cat((cache[1], v), 1)
    age = positions[:, None] - torch.arange(start + T - k.shape[1], start + T)
    seen = (age >= 0) & (age < (window or age.max() + 1))
    shared = c.num_heads // c.num_kv_heads
    keys, values = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    scores = soft_cap(torch.einsum("bqnh,bknh->bnqk", q, keys) / c.head_dim**0.5, c.attention_soft_cap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    mixed = torch.einsum("bnqk,bknh->bqnh", weights, values).flatten(2)
    out = mixed @ p[f"{name}.output.weight"].t()
    return x + rms_norm(out, p.get(f"{name}.post_norm.weight"), c.norm_eps), (k, v)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def activation(x: Tensor, c: ModelConfig) -> Tensor:
    if c.gate == "silu":
        return x * torch.sigmoid(x)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(p: State, name: str, x: Tensor, weights: list[Tensor] | None, c: ModelConfig) -> Tensor:
    gate, up, down = weights or [p[f"{name}.{m}.weight"] for m in ("gate", "up", "down")]
    h = rms_norm(x, p.get(f"{name}.pre_norm.weight"), c.norm_eps)
    a = h @ gate.transpose(-1, -2)
    out = (activation(a, c) * (h @ up.transpose(-1, -2))) @ down.transpose(-1, -2)
    return x + rms_norm(out, p.get(f"{name}.post_norm.weight"), c.norm_eps)


def end_to_end_losses(
    p: State,
    c: ModelConfig,
    ids: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    lr: float,
    clip: float | None,
    between: Callable[[int, Weights, Caches], tuple[Weights, Caches]] = lambda i, fast, caches: (fast, caches),
) -> tuple[Tensor, Weights]:
    """The loss of every mini-batch, [B, T / M], and the fast weights after the last one, block by block.

    `between(i, fast, caches)` gives what mini-batch i begins with instead, as other meta-gradients have it.
    """
    B, T, M = *ids.shape, c.mini_batch_size
    prefix = [f"blocks.{i}" for i in range(c.num_prefix_blocks)]
    suffix = [f"blocks.{i}" for i in range(c.num_prefix_blocks, c.num_blocks)]
    x = p["embedding.weight"][ids] * c.embedding_scale
    for block in prefix:
        x, _ = attention(p, block, x, None, 0, c)
        x = mlp(p, f"{block}.static_mlp", x, None, c)
    fast = [[p[f"{block}.fast_mlp.{m}.weight"].expand(B, -1, -1) for m in ("gate", "up", "down")] for block in suffix]
    caches: Caches = [None] * len(suffix)
    losses = []
    for start in range(0, T, M):
        part = slice(start, start + M)
        fast, caches = between(start // M, fast, caches)
        h = x[:, part]
        for j, block in enumerate(suffix):
            h, caches[j] = attention(p, block, h, caches[j], start, c)
            h = mlp(p, f"{block}.fast_mlp", h, fast[j], c)
            h = mlp(p, f"{block}.static_mlp", h, None, c)
        h = rms_norm(h, p["final_norm.weight"], c.norm_eps)
        logits = soft_cap(h @ p.get("head.weight", p["embedding.weight"]).t(), c.logit_soft_cap)
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(-1, targets[:, part, None]).squeeze(-1)
        loss = (nll * mask[:, part]).sum(1) / mask[:, part].sum(1).clamp(min=1e-10)
        losses.append(loss)
        flat = [w for weights in fast for w in weights]
        gradients = torch.autograd.grad(loss.sum(), flat, create_graph=True)
        square = torch.stack([(g * g).sum((1, 2)) for g in gradients]).sum(0)
        norm = torch.where(square > 0, square, 1.0).sqrt()  # the derivative of √0 is not finite
        scale = torch.ones_like(norm) if clip is None else (clip / norm).clamp(max=1)
        flat = [w - lr * scale[:, None, None] * g for w, g in zip(flat, gradients, strict=True)]
        fast = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    return torch.stack(losses, 1), fast


def mean_loss(losses: Tensor, mask: Tensor) -> Tensor:
    """The mean over sequences of the mean over mini-batches, of those that have a target."""
    counts = mask.unflatten(1, (losses.shape[1], -1)).any(2)
    return torch.stack([row[kept].mean() for row, kept in zip(losses, counts, strict=True) if kept.any()]).mean()
