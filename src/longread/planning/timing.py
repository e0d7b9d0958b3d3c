"""Seconds of a training step on several GPUs: computing at the measured share of the peak, then communicating.

Nothing overlaps: the gradient is one CUDA graph, and what travels does so after it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from longread.config import RunConfig, recomputation
from longread.flops import recomputed_flops, training_flops
from longread.outer_loop import num_trained
from longread.parallel.rows import BUCKET_BYTES
from longread.planning.gpus import Gpu
from longread.planning.layout import Layout
from longread.planning.measured import update_seconds, utilisation
from longread.planning.memory import BYTES, GRADIENT, WEIGHT, Load, groups_of

LINK_SHARE = 0.45
"""Of a link's nominal rate that a collective reaches. Two H200s without NVLink multicast reached 0.35 with 16 MiB, 0.50
with 128 MiB and 0.61 with 2 GiB; what travels by itself in a step is mostly between the first two."""
NETWORK_SHARE = 0.75
"""The same of a network adapter between nodes: an assumption."""
LATENCY = 15e-6
"""Seconds of a collective between two GPUs, however little travels, and of each doubling of their number: an
assumption."""


class StepSeconds(NamedTuple):
    """Seconds of one step by what they go into, one after the other."""

    compute: float
    update: float
    """AdamW."""
    state_parallel: float
    """Sums of the fast MLPs' results over the GPUs that share sequences."""
    within: float
    """Gradients and parameters within a node."""
    between: float
    """Gradients between nodes."""

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def efficiency(self) -> float:
        """Of the time, the share in which GPUs compute."""
        return (self.compute + self.update) / self.total


def step_seconds(config: RunConfig, layout: Layout, gpu: Gpu, load: Load) -> StepSeconds:
    """The parts of a step of `config`, of which each GPU computes its share as `load` says."""
    model, tokens = layout.local(config.model), layout.share(config) * config.context_length
    work = training_flops(model, config.context_length, config.loss)
    work += recomputed_flops(model, config.context_length, config.loss, load.recompute)
    trained = num_trained(config.model, config.trained_blocks)
    within, between = _travelling(config, layout, gpu, load)
    return StepSeconds(
        compute=work * tokens / (utilisation(config).share * gpu.flops),
        update=update_seconds(trained / layout.shards, gpu),
        state_parallel=_summing(config, layout, gpu, load),
        within=within,
        between=between,
    )


def collective_seconds(size: float, ranks: int, rate: float, count: int = 1) -> float:
    """Of a reduce-scatter or all-gather of `size` bytes in all, in `count` pieces; half of an all-reduce.

    What each rank sends is (ranks − 1) / ranks of it (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

    Args:
        rate: bytes per second that a collective reaches on each rank's link in one direction.
    """
    if ranks == 1:
        return 0.0
    return size * (ranks - 1) / ranks / rate + count * LATENCY * math.ceil(math.log2(ranks))


def _travelling(config: RunConfig, layout: Layout, gpu: Gpu, load: Load) -> tuple[float, float]:
    """Seconds within a node and between nodes: gradients come together, new values or weights go round."""
    model, ranks, nodes = config.model, layout.gpus, layout.nodes
    gradient = GRADIENT * num_trained(model, config.trained_blocks)
    pieces = math.ceil(gradient / BUCKET_BYTES)
    between = 2 * collective_seconds(gradient / ranks, nodes, NETWORK_SHARE * gpu.network, pieces)
    if layout.parallelism.update != "fully-sharded":  # reduce-scatter and all-gather; an all-reduce is both
        return 2 * collective_seconds(gradient, ranks, LINK_SHARE * gpu.link, pieces), between
    groups, times = groups_of(model), layout.share(config) // load.micro_batch_size
    gathered = WEIGHT * (groups.root + 2 * groups.blocks * groups.block)  # blocks once more for their gradient
    seconds = collective_seconds(gathered, ranks, LINK_SHARE * gpu.link, 1 + 2 * groups.blocks)
    seconds += collective_seconds(gradient, ranks, LINK_SHARE * gpu.link, 1 + groups.blocks)
    return times * seconds, between


def _summing(config: RunConfig, layout: Layout, gpu: Gpu, load: Load) -> float:
    """Seconds of state parallel: each fast MLP sums its results, and gradients of its inputs, over the GPUs that share
    it: in its forward pass, in the inner gradient, and in the gradients of both; twice more where a step runs again.
    Each step sums a norm besides, and the gradient of that.
    """
    P, model = layout.parallelism.state, config.model
    times = layout.share(config) / load.micro_batch_size
    steps = times * config.context_length // model.mini_batch_size
    again = times * recomputation(load.recompute, model, config.loss, config.context_length).steps
    sums = (4 * steps + 2 * again) * model.num_suffix_blocks
    size = load.micro_batch_size * model.mini_batch_size * model.width * BYTES
    norms = 2 * steps + again
    return 2 * (
        sums * collective_seconds(size, P, LINK_SHARE * gpu.link)
        + norms * collective_seconds(8, P, LINK_SHARE * gpu.link)
    )
