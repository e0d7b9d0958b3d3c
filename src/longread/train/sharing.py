"""A rank's part of a run: its share of each batch, and the rows of parameters that it steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch

from longread.config import Parallelism, RunConfig, UserError
from longread.data import Batch, Sampler
from longread.model import Transformer
from longread.parallel import DividedRows, Launch, World
from longread.parallel.rows import row_mesh
from longread.train.meta_step import fully_sharded
from longread.train.optimizer import trained_parameters


@dataclass(frozen=True)
class Share:
    """Of a batch: ranks that divide the fast MLPs read the same sequences, all others different ones."""

    index: int = 0
    count: int = 1
    """Shares of a batch."""
    copies: int = 1
    """Ranks that read the same share, neighbours of one another."""

    @classmethod
    def of(cls, launch: Launch, parallelism: Parallelism, config: RunConfig) -> Self:
        """Raises `UserError` where a batch cannot be divided so."""
        copies = parallelism.state
        if launch.local_size % copies:
            raise UserError(
                f"parallelism.state {copies} does not divide the {launch.local_size} ranks of a machine; use a divisor"
            )
        count = launch.size // copies
        if config.batch_size % count:
            raise UserError(
                f"batch_size {config.batch_size} does not divide among {count} ranks; use a multiple of {count}"
            )
        return cls(launch.rank // copies, count, copies)

    def batch(self, sampler: Sampler, step: int) -> Batch:
        """Of the batch of `step`, on the CPU."""
        return sampler.batch(step, self.index, self.count)

    def of_config(self, config: RunConfig) -> RunConfig:
        """`config` for one rank: fewer sequences, and its part of the hidden units of fast MLPs."""
        model = config.model
        if self.copies > 1:
            model = dataclasses.replace(model, fast_hidden=model.fast_mlp_hidden // self.copies)
        size = config.batch_size // self.count
        micro = config.micro_batch_size
        if micro is not None:
            micro = next(n for n in range(min(micro, size), 0, -1) if size % n == 0)
        return dataclasses.replace(config, model=model, batch_size=size, micro_batch_size=micro)


WHOLE = Share()
"""Of one process alone."""


def divided(model: Transformer, parallelism: Parallelism, world: World, device: torch.device) -> DividedRows:
    """The trained parameters of `model` as the ranks step them; all make it together."""
    parameters = trained_parameters(model)
    if world.size == 1:
        return DividedRows(parameters)
    if parallelism.update == "fully-sharded":
        return fully_sharded(model, row_mesh(world.size, world.launch.local_size, device.type, world.deadline))
    divisor = world.launch.local_size if parallelism.update == "shared" else 1
    return DividedRows(parameters, row_mesh(world.size, divisor, device.type, world.deadline))
