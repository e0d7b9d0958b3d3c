"""Inner steps within a fixed subspace of few dimensions: what a session would have to keep is rows × rank numbers.

    W_i = W_{i-1} − η · min(1, c / ‖G P‖) · (G P) Pᵀ          ‖·‖ over all fast weights of one sequence

G [rows, columns] is the gradient of a matrix, P [columns, rank] has orthonormal columns, drawn once for a number of
columns and never changed. So W_i − W_0 = A_i Pᵀ with A_i [rows, rank], and A_i is all that differs between sessions.
It is LoRA (arXiv 2106.09685) whose A is drawn and fixed, as in LoRA-FA (arXiv 2308.03303); the rate is not rescaled.
The whole W_i is kept here all the same: the experiment is about what such steps are worth.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from longread import ModelConfig, register_inner_optimizer

RANKS = (16, 64)


def register() -> None:
    """Lets `inner.optimizer` be low-rank-16 or low-rank-64."""
    for rank in RANKS:
        register_inner_optimizer(f"low-rank-{rank}", rule_of(rank))


@functools.cache
def rule_of(rank: int) -> functools.partial[list[Tensor]]:
    return functools.partial(low_rank, rank=rank)


def low_rank(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float | Tensor, clip: float | None, rank: int
) -> list[Tensor]:
    """The step above for weights [B, rows, columns]; a rank above the columns is all of them."""
    bases = [basis(g.shape[-1], min(rank, g.shape[-1]), g.device, g.dtype) for g in gradients]
    parts = [g @ P for g, P in zip(gradients, bases, strict=True)]
    scale: float | Tensor = lr
    if clip is not None:
        squares = torch.stack([part.square().flatten(1).sum(1) for part in parts]).sum(0)
        # The derivative of a root at 0 is infinite, and a mini-batch may have no target.
        norm = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
        scale = lr * torch.where(squares > clip * clip, clip / norm, torch.ones_like(norm)).view(-1, 1, 1)
    return [w - scale * (part @ P.mT) for w, part, P in zip(weights, parts, bases, strict=True)]


@functools.cache
def basis(columns: int, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """P [columns, rank]: the same for every matrix of so many columns, on every machine up to rounding."""
    drawn = torch.randn(columns, columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0][:, :rank].to(device, dtype).contiguous()


def session_numbers(model: ModelConfig, rank: int) -> int:
    """Numbers A of a session: gate and up have rows of the width, down of the hidden units."""
    D, F = model.width, model.fast_hidden or model.mlp_hidden
    return model.num_suffix_blocks * (2 * F * min(rank, D) + D * min(rank, F))
