"""The loss on held-out text during training: read learning, and read frozen for comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from longread.config import RunConfig
from longread.data import Batch, Sampler
from longread.inner_loop import begin, mini_batch_loss, read
from longread.model import Transformer
from longread.outer_loop import mean_loss
from longread.parallel import ALONE, World
from longread.train.sharing import WHOLE, Share

BATCHES = 4  # batches of the training size; enough to see a trend, few enough not to be seen in the time
TOKENS = 2**14
"""Of sequences that are read at a time: the memory is what training leaves, and a GPU is busy with fewer."""


class _Stopped(Exception):
    """Nobody waits for the losses any more."""


def validation_losses(
    model: Transformer,
    config: RunConfig,
    sampler: Sampler,
    share: Share = WHOLE,
    world: World = ALONE,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`validation_loss` (learning) and `validation_loss_frozen`, in nats per token.

    Each call reads the same few batches, of which each rank reads its share. A model without fast weights has only the
    first loss. There are none once `stopped()` is true on any rank: a reading of long contexts takes minutes.
    """
    ways = {"validation_loss": True} | ({"validation_loss_frozen": False} if model.config.num_suffix_blocks else {})
    counted, losses = 0, [0.0] * len(ways)
    was_stopped = True
    with world.together("the validation"), contextlib.suppress(_Stopped):
        batches = [share.batch(sampler, i) for i in range(BATCHES)]
        counted = sum(int(batch.loss_mask.any(1).sum()) for batch in batches)
        losses = [_mean_loss(model, config, batches, learn, stopped) for learn in ways.values()]
        was_stopped = False
    sequences, any_stopped = world.total(counted, was_stopped, at="counting validation targets")
    weight = counted / sequences if sequences else 1.0
    means = world.total(*(weight * loss for loss in losses), at="the sum of the validation losses")
    return {} if any_stopped else dict(zip(ways, means, strict=True))


def _mean_loss(
    model: Transformer, config: RunConfig, batches: list[Batch], learn: bool, stopped: Callable[[], bool]
) -> float:
    losses, size = [], max(1, TOKENS // config.context_length)
    for batch in batches:
        for start in range(0, len(batch.input_ids), size):
            if stopped():
                raise _Stopped
            part = Batch(*(tensor[start : start + size] for tensor in batch))
            losses.append(_mini_batch_losses(model, config, part, learn=learn))
    masks = [batch.loss_mask.to(model.device) for batch in batches]
    return mean_loss(torch.cat(losses), torch.cat(masks)).item()


def _mini_batch_losses(model: Transformer, config: RunConfig, batch: Batch, *, learn: bool) -> Tensor:
    """[B, T / M]"""
    batch = batch.to(model.device)
    tokens = torch.cat([batch.input_ids[:, :1], batch.target_ids], dim=1)
    mask = torch.cat([torch.ones_like(batch.loss_mask[:, :1]), batch.loss_mask], dim=1)
    state = begin(model, len(tokens))
    nll = read(model, state, tokens, inner=config.inner, learn=learn, loss_mask=mask).nll[:, 1:]
    M = model.config.mini_batch_size
    return mini_batch_loss(nll.unflatten(1, (-1, M)), batch.loss_mask.unflatten(1, (-1, M)))
