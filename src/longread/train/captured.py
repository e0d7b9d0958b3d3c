"""The gradient of a batch as one CUDA graph: thousands of small launches replayed as one.

All shapes of an outer step are static, and everything that changes from step to step (tokens, inner rate) is read from
tensors that stay in place. The graph is checked (`inner_loop/graphs.py`) by the loss and the norm of the gradient.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import RunConfig
from longread.data import Batch
from longread.inner_loop.graphs import CheckedGraphs
from longread.model import Transformer
from longread.train.gradient import BatchGradient, accumulate_gradient

TOLERANCE = 0.01
"""Relative difference of loss or gradient norm above which a capture is refused; bf16 and atomics differ by far less.
"""


class _Replayed(NamedTuple):
    """The outputs of a replay, at the same addresses each time."""

    batch: BatchGradient
    gradients: tuple[Tensor | None, ...]
    """Of the parameters in their order."""


class CapturedGradient:
    """`accumulate_gradient` for one model, one config and batches of one shape, on a CUDA device.

    The first call computes it plainly too, and takes as much memory as it does, twice, one after the other.
    """

    def __init__(
        self, model: Transformer, config: RunConfig, agreed: Callable[[bool], bool] = lambda good: good
    ) -> None:
        """`agreed` says whether a capture is good on all ranks, where these compute a gradient together."""
        self.model, self.config = model, config
        self._graphs = CheckedGraphs[_Replayed](
            model.device,
            compared=_loss_and_norm,
            scale=Tensor.abs,
            tolerance=TOLERANCE,
            warning="the captured step gives a loss or gradient norm {:.2%} off; training goes on without",
            agreed=agreed,
        )
        self._batch: Batch | None = None
        self._inner_lr = torch.zeros((), device=model.device)

    def __call__(self, batch: Batch, *, inner_lr: float, stopped: Callable[[], bool] = lambda: False) -> BatchGradient:
        """Sets the gradients of the model to that of the batch's loss. A graph is not left once it runs."""
        if not self._graphs.usable:
            return accumulate_gradient(self.model, self.config, batch, inner_lr=inner_lr, stopped=stopped)
        self._batch = self._batch or Batch(*(torch.empty_like(tensor) for tensor in batch))
        for place, value in zip(self._batch, batch, strict=True):
            place.copy_(value)
        self._inner_lr.fill_(inner_lr)
        compute = functools.partial(self._compute, self._batch)
        found = self._graphs.run("gradient", compute, kept=lambda: self._forget)
        for parameter, gradient in zip(self.model.parameters(), found.gradients, strict=True):
            parameter.grad = gradient
        return found.batch

    def _compute(self, batch: Batch) -> _Replayed:
        found = accumulate_gradient(self.model, self.config, batch, inner_lr=self._inner_lr)
        return _Replayed(found, tuple(parameter.grad for parameter in self.model.parameters()))

    def _forget(self) -> None:
        """Gradients, so that the next take their place, and what holds graphs of autograd in circles."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()


def _loss_and_norm(found: _Replayed) -> Tensor:
    norm = torch.nn.utils.get_total_norm([gradient for gradient in found.gradients if gradient is not None])
    return torch.stack((found.batch.loss, norm))
