"""The gradient of the outer loss of one batch, accumulated over micro-batches of its sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import RunConfig
from longread.data import Batch
from longread.model import Transformer
from longread.outer_loop import OuterLoss, end_to_end_loss, num_counted, static_loss


class BatchGradient(NamedTuple):
    """The gradient of a batch and the figures on the way to it."""

    loss: Tensor
    """Of the batch, [] (see `longread.outer_loop.mean_loss`)."""
    inner_grad_norm: Tensor
    """Before clipping, [B, inner steps]; [B, 0] for the static loss."""


class StepLeft(Exception):
    """A step was left between two of its micro-batches."""


def accumulate_gradient(
    model: Transformer,
    config: RunConfig,
    batch: Batch,
    *,
    inner_lr: float | Tensor,
    stopped: Callable[[], bool] = lambda: False,
) -> BatchGradient:
    """Adds the gradient of the batch's loss, the mean over its sequences, to the gradients of `model`.

    Sequences run `config.micro_batch_size` at a time; the result does not depend on it but for rounding, since each
    part counts by its sequences that have a target. Nothing here waits for the device. Raises `StepLeft` when
    `stopped()` between two of them.
    """
    total = num_counted(batch.loss_mask)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    for part, _ in micro_batches(batch, config.micro_batch_size):
        if losses and stopped():
            raise StepLeft
        outer = outer_loss(model, config, part, inner_lr)
        loss = outer.loss * num_counted(part.loss_mask) / total
        loss.backward()
        losses.append(loss.detach())
        norms.append(outer.inner_grad_norm.detach())
    return BatchGradient(torch.stack(losses).sum(), torch.cat(norms))


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, bool]]:
    """`size` sequences at a time, or all at once; and whether they are the last."""
    count = batch.input_ids.shape[0]
    for start in range(0, count, size or count):
        end = start + (size or count)
        yield Batch(*(tensor[start:end] for tensor in batch)), end >= count


class InnerSums(NamedTuple):
    """Over inner steps on mini-batches with a target; added over ranks before they are divided."""

    steps: float
    norm: float
    """Before clipping."""
    clipped: float
    """Steps that the clip shortened."""

    def means(self) -> dict[str, float]:
        """As metrics: `inner_grad_norm`, and `inner_clipped`, a share; empty where there was no step."""
        if not self.steps:
            return {}
        return {"inner_grad_norm": self.norm / self.steps, "inner_clipped": self.clipped / self.steps}


def inner_sums(norms: Tensor, loss_mask: Tensor, clip: float | None) -> InnerSums:
    """Of one batch.

    Args:
        norms: [B, steps]; loss_mask: bool [B, T].
    """
    B, steps = norms.shape
    if not steps:
        return InnerSums(0, 0.0, 0)
    norms = norms[loss_mask.view(B, steps + 1, -1).any(-1)[:, :-1]].double()
    return InnerSums(len(norms), norms.sum().item(), int((norms > (math.inf if clip is None else clip)).sum()))


def outer_loss(model: Transformer, config: RunConfig, batch: Batch, inner_lr: float | Tensor) -> OuterLoss:
    """The loss that `config` says, of all sequences of `batch` at once."""
    if config.loss == "static":
        return static_loss(model, *batch, recompute=config.recompute)
    return end_to_end_loss(
        model,
        *batch,
        inner_lr=inner_lr,
        inner_clip=config.inner.clip,
        inner_optimizer=config.inner.optimizer,
        inner_surprise=config.inner.surprise,
        meta_gradient=config.meta_gradient,
        truncate_after=config.truncate_after,
        recompute=config.recompute,
    )
