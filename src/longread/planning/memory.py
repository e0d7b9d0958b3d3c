"""Bytes on one GPU of a run on several. All of them are estimates."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from longread.config import ModelConfig, Recompute, RunConfig, UserError
from longread.outer_loop import fit, graph_bytes, num_trained
from longread.outer_loop.memory import SHARE
from longread.parallel.rows import BUCKET_BYTES
from longread.planning.layout import Layout

BYTES = 2
"""Of a number that products run in: bfloat16."""
WEIGHT = GRADIENT = 4
MOMENTS = 8
"""Bytes a parameter, in float32."""
PROCESS = 2**30
"""Bytes of CUDA's context, and of NCCL's buffers where there are several GPUs: an assumption."""


class GpuMemory(NamedTuple):
    """Bytes by what they are for, as if all were at their peak together."""

    weights: int
    gradients: int
    """Of this GPU's sequences, and summed over all where a GPU keeps both."""
    moments: int
    gathered: int
    """Weights that others hold and gradients for them, while they are needed here."""
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class Groups(NamedTuple):
    """Parameters as `fully-sharded` gathers them: each prefix block, and all else together, in numbers."""

    blocks: int
    block: int
    root: int


class Load(NamedTuple):
    """The load of one GPU at a time, and the memory that it takes."""

    micro_batch_size: int
    recompute: Recompute
    memory: GpuMemory
    spare: bool
    """Whether as much stays free as `longread train` leaves."""


def groups_of(model: ModelConfig) -> Groups:
    """The groups of a network."""
    blocks = model.num_prefix_blocks
    if not blocks:
        return Groups(0, 0, model.num_parameters)
    embeddings = model.vocab_size * model.width * (1 if model.tie_embeddings else 2)
    prefix = model.num_parameters - embeddings - num_trained(model, model.num_suffix_blocks)
    return Groups(blocks, prefix // blocks, model.num_parameters - prefix)


def state_bytes(config: RunConfig, layout: Layout) -> GpuMemory:
    """Everything but activations, which are 0 here."""
    model = config.model
    held, trained = model.num_parameters, num_trained(model, config.trained_blocks)
    shards = layout.shards
    if layout.parallelism.update == "fully-sharded" and shards > 1:
        groups = groups_of(model)
        most = groups.root + groups.block
        gathered = WEIGHT * most + GRADIENT * min(most, trained)
        return GpuMemory(
            WEIGHT * held // shards,
            GRADIENT * trained // shards,
            MOMENTS * trained // shards,
            gathered,
            PROCESS,
            0,
        )
    summed = GRADIENT * trained // shards if layout.all_gpus > 1 else 0
    bucket = max(BUCKET_BYTES, GRADIENT * model.vocab_size * model.width) if layout.all_gpus > 1 else 0
    return GpuMemory(
        WEIGHT * held,
        GRADIENT * trained + summed,
        MOMENTS * trained // shards,
        0,
        PROCESS + bucket + bucket // shards,  # what is sent, and what comes of it
        0,
    )


def load_of(config: RunConfig, layout: Layout, memory: float) -> Load:
    """As much at a time as leaves memory to spare, as `longread train` settles it; the leanest if nothing does.

    Args:
        memory: bytes of the GPU.
    """
    share, model, state = layout.share(config), layout.local(config.model), state_bytes(config, layout)
    size = config.micro_batch_size
    if size and share % size:
        raise UserError(
            f"{size} sequences at a time do not divide the {share} of each GPU; choose a divisor of {share}"
        )
    beside = state.total - state.weights
    found = fit(
        dataclasses.replace(config, model=model, batch_size=share),
        itemsize=BYTES,
        kernels=True,
        budget=SHARE * (memory - state.weights) - beside,
    )
    need = graph_bytes(
        model,
        config.loss,
        batch_size=found.micro_batch_size,
        context_length=config.context_length,
        itemsize=BYTES,
        kernels=True,
        trained_blocks=config.trained_blocks,
    )
    schedule = found.recompute
    if config.loss == "static" and schedule != "none" and not schedule.endswith("blocks"):
        schedule = "blocks"  # as the static loss takes it
    return Load(found.micro_batch_size, schedule, state._replace(activations=need[schedule]), not found.missing)
