"""The loss on held-out text during training: read learning, and read frozen for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from longread.config import RunConfig
from longread.data import Batch, Sampler
from longread.inner_loop import begin, mini_batch_loss, read
from longread.model import Transformer
from longread.outer_loop import mean_loss

BATCHES = 4  # batches of the training size; enough to see a trend, few enough not to be seen in the time
TOKENS = 2**14
"""Of sequences that are read at a time: the memory is what training leaves, and a GPU is busy with fewer."""


def validation_losses(model: Transformer, config: RunConfig, sampler: Sampler) -> dict[str, float]:
    """`validation_loss` (learning) and `validation_loss_frozen`, in nats per token.

    Each call reads the same few batches. A model without fast weights has only the first loss.
    """
    batches = [sampler.batch(i) for i in range(BATCHES)]
    found = {"validation_loss": _mean_loss(model, config, batches, learn=True)}
    if model.config.num_suffix_blocks:
        found["validation_loss_frozen"] = _mean_loss(model, config, batches, learn=False)
    return found


def _mean_loss(model: Transformer, config: RunConfig, batches: list[Batch], *, learn: bool) -> float:
    losses = [
        _mini_batch_losses(model, config, Batch(*(tensor[start : start + size] for tensor in batch)), learn=learn)
        for batch in batches
        for size in [max(1, TOKENS // config.context_length)]
        for start in range(0, len(batch.input_ids), size)
    ]
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
