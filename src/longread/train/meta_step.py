"""Training with parameters that are divided among ranks (FSDP2): the outer loss is one `forward`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longread.config import RunConfig, UserError
from longread.data import Batch
from longread.model import Transformer, undrawn
from longread.outer_loop import OuterLoss
from longread.parallel import FullySharded, whole_tensors
from longread.train.gradient import BatchGradient, StepLeft, micro_batches, outer_loss


class MetaStep(nn.Module):
    """The outer loss of a micro-batch as a `forward`, between whose beginning and backward FSDP keeps parameters whole.

    FSDP knows of a parameter's use by the `forward` of its module. The suffix and the head are used once a mini-batch,
    by gradients inside that `forward` too, so they are its own; a prefix block is used once.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, config: RunConfig, batch: Batch, inner_lr: float | Tensor) -> OuterLoss:
        """As `config` has it.

        Raises `UserError` if parameters were gathered in half precision, which rounds W_0, or if fast MLPs are to be
        divided too.
        """
        if self.model.state_group is not None:
            raise UserError("parallelism.state above 1 does not go with fully sharded parameters; use update shared")
        if self.model.embedding.weight.itemsize < 4:
            raise UserError(
                f"parameters arrive in {self.model.embedding.weight.dtype}; shard them without MixedPrecisionPolicy: "
                "products run in Transformer.compute_dtype, and fast weights begin in float32"
            )
        with warnings.catch_warnings():  # a block's keys and values are views, which nothing changes in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            return outer_loss(self.model, config, batch, inner_lr)


def fully_sharded(model: Transformer, mesh: DeviceMesh, *, reshard: bool = True) -> FullySharded:
    """Divides the parameters of `model`, in place, among the ranks of a `row_mesh`; its root is a `MetaStep`.

    The prefix is gathered block by block; all else is whole while a micro-batch is computed. `reshard` as in
    `FullySharded`. Parameters that are not to be trained must be frozen before.
    """
    return FullySharded(MetaStep(model), model, [(block, "below") for block in model.prefix], mesh, reshard=reshard)


class FullyShardedGradient:
    """`accumulate_gradient` for parameters that are divided. No CUDA graph: addresses change."""

    def __init__(self, rows: FullySharded, config: RunConfig) -> None:
        """`rows` are those of `fully_sharded`."""
        self.rows, self.config = rows, config

    def __call__(
        self, batch: Batch, *, inner_lr: float | Tensor, stopped: Callable[[], bool] = lambda: False
    ) -> BatchGradient:
        """Adds the gradient of this rank's batch, for `FullySharded.reduce`. All ranks call it together.

        `stopped` is asked by all ranks between two micro-batches and must give all the same answer: each micro-batch
        waits for parameters of the others.
        """
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        counts: list[Tensor] = []
        for part, last in micro_batches(batch, self.config.micro_batch_size):
            if losses and stopped():
                raise StepLeft
            count = part.loss_mask.any(1).sum()
            outer: OuterLoss = self.rows.root(self.config, part, inner_lr)  # type: ignore[operator]
            self.rows.backward(outer.loss, count, last=last)
            losses.append(outer.loss.detach() * count)
            norms.append(outer.inner_grad_norm)
            counts.append(count)
        total = torch.stack(counts).sum().clamp(min=1)
        return BatchGradient(torch.stack(losses).sum() / total, torch.cat(norms))


def whole_model(model: Transformer, device: str | torch.device, *, on_all: bool = True) -> Transformer | None:
    """A copy of a model whose parameters are divided, with whole ones on `device`: to validate, or to save it.

    All ranks call it together; with `on_all` False rank 0 gets it, the others None.
    """
    tensors = whole_tensors(model, device, on_all=on_all)
    if not tensors:
        return None
    copy = undrawn(model.config)
    copy.load_state_dict(tensors, assign=True)
    copy.compute_dtype, copy.known_tokens = model.compute_dtype, model.known_tokens
    return copy
