"""The gradient of the outer loss of one batch, accumulated over micro-batches of its sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import RunConfig
from longread.data import Batch
from longread.model import Transformer
from longread.outer_loop import OuterLoss, end_to_end_loss, static_loss


class BatchGradient(NamedTuple):
    """What was found on the way to a gradient."""

    loss: Tensor
    """Mean over sequences, []."""
    inner_grad_norm: Tensor
    """Before clipping, [B, inner steps]; [B, 0] for the static loss."""


def accumulate_gradient(
    model: Transformer, config: RunConfig, batch: Batch, *, inner_lr: float | Tensor
) -> BatchGradient:
    """Adds the gradient of the batch's loss, the mean over its sequences, to the gradients of `model`.

    Sequences run `config.micro_batch_size` at a time; the result does not depend on it but for rounding.
    """
    count = batch.input_ids.shape[0]
    size = config.micro_batch_size or count
    losses, norms = [], []
    for start in range(0, count, size):
        part = Batch(*(tensor[start : start + size] for tensor in batch))
        outer = _outer_loss(model, config, part, inner_lr)
        share = part.input_ids.shape[0] / count
        (outer.loss * share).backward()
        losses.append(outer.loss.detach() * share)
        norms.append(outer.inner_grad_norm.detach())
    return BatchGradient(torch.stack(losses).sum(), torch.cat(norms))


def _outer_loss(model: Transformer, config: RunConfig, batch: Batch, inner_lr: float | Tensor) -> OuterLoss:
    if config.loss == "static":
        return static_loss(model, *batch, recompute=config.recompute)
    return end_to_end_loss(
        model,
        *batch,
        inner_lr=inner_lr,
        inner_clip=config.inner.clip,
        meta_gradient=config.meta_gradient,
        truncate_after=config.truncate_after,
        recompute=config.recompute,
    )
