"""The definition: one token after the other; the gradient of a mini-batch is left to autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def reference_key_value_binding(
    query: Tensor | None,
    new: Sequence[Tensor],
    memory: Sequence[Tensor],
    waiting: Sequence[Tensor],
    *,
    mini_batch_size: int,
    lr: float,
    clip: float | None,
) -> tuple[Tensor, Tensors, Tensors]:
    """The contract of `longread.ops.key_value_binding.key_value_binding`, at any order of derivative."""
    asked = new[0] if query is None else query
    weights, held, found = tuple(memory), tuple(waiting), []
    for t in range(asked.shape[2]):
        found.append(_answer(asked[:, :, t], weights))
        held = tuple(torch.cat((old, x[:, :, t : t + 1]), dim=2) for old, x in zip(held, new, strict=True))
        if held[0].shape[2] == mini_batch_size:
            weights, held = _stepped(weights, held, lr, clip), tuple(x[:, :, :0] for x in held)
    return (torch.stack(found, dim=2) if found else torch.empty_like(asked)), weights, held


def _answer(x: Tensor, weights: Tensors) -> Tensor:
    """g(x; W) of one token, x: [B, N, H]."""
    gate, up, down = weights
    a, b = (torch.einsum("bneh,bnh->bne", w, x) for w in (gate, up))
    return torch.einsum("bnhe,bne->bnh", down, a * a.sigmoid() * b)


def _stepped(weights: Tensors, held: Tensors, lr: float, clip: float | None) -> Tensors:
    key, value, rate = held
    with torch.enable_grad():
        weights = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in weights)
        loss = key.new_zeros(())
        for t in range(key.shape[2]):
            missed = _answer(key[:, :, t], weights) - value[:, :, t]
            loss = loss + (rate[:, :, t] * missed.square().sum(-1)).sum() / key.shape[2]
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        norm = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()  # type: ignore[union-attr]
        scale = torch.ones_like(norm) if clip is None else torch.where(norm > clip, clip / norm, 1.0)
        return tuple(w - lr * scale.view(-1, 1, 1, 1) * g for w, g in zip(weights, gradients, strict=True))
