"""Mini-batch by mini-batch, with the inner gradient written out."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.clipped_sgd import clipped_sgd

Tensors = tuple[Tensor, ...]


def explicit_key_value_binding(
    query: Tensor | None,
    new: Sequence[Tensor],
    memory: Sequence[Tensor],
    waiting: Sequence[Tensor],
    *,
    mini_batch_size: int,
    lr: float,
    clip: float | None,
) -> tuple[Tensor, Tensors, Tensors]:
    """The contract of `longread.ops.key_value_binding.key_value_binding`."""
    key, M = new[0], mini_batch_size
    asked = key if query is None else query
    weights, held, found = tuple(memory), tuple(waiting), []
    first = min(key.shape[2], M - held[0].shape[2])
    lengths = [first, *[M] * ((key.shape[2] - first) // M), (key.shape[2] - first) % M]
    # cut at once: the gradient of a slice is as large as all that it was cut from
    for question, *part in zip(*(x.split(lengths, dim=2) for x in (asked, *new)), strict=True):
        if not question.shape[2]:
            continue
        working = tuple(w.to(key.dtype) for w in weights)  # the products' type; steps keep that of the weights
        found.append(_answer(question, *working)[0])
        held = (
            tuple(torch.cat(pair, dim=2) for pair in zip(held, part, strict=True)) if held[0].shape[2] else tuple(part)
        )
        if held[0].shape[2] == M:
            weights, _ = clipped_sgd(weights, _gradient(working, *held), lr=lr, clip=clip)
            held = tuple(x[:, :, :0] for x in held)
    return (torch.cat(found, dim=2) if found else torch.empty_like(asked)), weights, held


def _answer(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g(x; W), and what it was made of: silu's input, the other factor, and their product."""
    a, b = x @ gate.mT, x @ up.mT
    h = F.silu(a) * b
    return h @ down.mT, a, b, h


def _gradient(working: Tensors, key: Tensor, value: Tensor, rate: Tensor) -> Tensors:
    """∇ of 1/M Σ_t r_t ‖g(k_t; W) − v_t‖² with respect to gate, up and down, each head for itself."""
    _, _, down = working
    y, a, b, h = _answer(key, *working)
    dy = (y - value) * (rate.unsqueeze(-1) * (2 / key.shape[2]))
    dh = dy @ down
    s = torch.sigmoid(a)
    da = dh * b * (s * (1 + a * (1 - s)))
    db = dh * (a * s)
    return da.mT @ key, db.mT @ key, dy.mT @ h
