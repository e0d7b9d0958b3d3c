"""The gradient of a batch as one CUDA graph: thousands of small launches replayed as one.

All shapes of an outer step are static, and everything that changes from step to step (tokens, inner rate) is read from
tensors that stay in place. The first call computes the gradient as usual, captures it, replays the capture on the same
batch and compares: a graph that gives other numbers is not used.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch

from longread.config import RunConfig
from longread.data import Batch
from longread.model import Transformer
from longread.train.gradient import BatchGradient, accumulate_gradient
from longread.train.optimizer import gradient_norm

TOLERANCE = 0.01
"""Relative difference of loss or gradient norm at which a capture is refused; bf16 and atomics differ by far less."""


class CapturedGradient:
    """`accumulate_gradient` for one model, one config and batches of one shape, on a CUDA device."""

    def __init__(
        self, model: Transformer, config: RunConfig, agreed: Callable[[bool], bool] = lambda good: good
    ) -> None:
        """`agreed` says whether a capture is good on all ranks, where these compute a gradient together."""
        self._agreed = agreed
        self.model, self.config = model, config
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False

    def __call__(self, batch: Batch, *, inner_lr: float, stopped: Callable[[], bool] = lambda: False) -> BatchGradient:
        """Sets the gradients of the model to that of the batch's loss. A graph is not left once it runs."""
        if self._refused:
            return accumulate_gradient(self.model, self.config, batch, inner_lr=inner_lr, stopped=stopped)
        if self._graph is None:
            return self._first(batch, inner_lr)
        for place, value in zip(self._batch, batch, strict=True):
            place.copy_(value)
        self._inner_lr.fill_(inner_lr)
        return self._replay(self._graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> BatchGradient:
        graph.replay()
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return self._found

    def _first(self, batch: Batch, inner_lr: float) -> BatchGradient:
        self._batch = Batch(*(tensor.clone() for tensor in batch))
        self._inner_lr = torch.tensor(inner_lr, device=self.model.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants libraries initialised, and on another stream
            eager = self._compute()
            expected = torch.stack((eager.loss, gradient_norm(self.model.parameters())))
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()  # the capture's memory is a pool of its own

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._found = self._compute()
        self._gradients = [parameter.grad for parameter in self.model.parameters()]
        found = self._replay(graph)
        actual = torch.stack((found.loss, gradient_norm(self.model.parameters())))
        if self._agreed(torch.allclose(actual, expected, rtol=TOLERANCE, atol=0.0, equal_nan=True)):
            self._graph = graph
            return found
        warnings.warn(
            f"the captured step gives loss and gradient norm {actual.tolist()} where the plain one gives "
            f"{expected.tolist()}; training goes on without the capture",
            stacklevel=2,
        )
        self._refused = True
        self.model.zero_grad(set_to_none=True)
        return accumulate_gradient(self.model, self.config, batch, inner_lr=inner_lr)

    def _compute(self) -> BatchGradient:
        return accumulate_gradient(self.model, self.config, self._batch, inner_lr=self._inner_lr)
