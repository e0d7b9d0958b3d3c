"""Ranks in a grid: neighbours read the same sequences and divide the hidden units of the fast MLPs, others read others.

The fast weights of a sequence, and all that an inner step computes from them, are the largest part of the memory of
meta-training; divided among P ranks each holds 1/P of them. Everything else is computed by every rank of a group alike.
Each fast MLP costs two sums of [B, M, D] over the group, one in each direction, and each inner step one of a number for
each sequence; so a group lies within one machine.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longread.config import ModelConfig, UserError
from longread.parallel.world import World, group_of


def divide_state(world: World, model: ModelConfig, size: int, device: str | torch.device) -> ProcessGroup | None:
    """The group of this rank, of `size` neighbours, for `Transformer.state_group`; None where nothing is divided.

    All ranks call it together. Which sequences a group reads says `longread.train.sharing.Share`.

    Gradients are averaged over all ranks afterwards, as without groups: by the number of sequences of a rank over the
    sum of these numbers over all ranks.

    Raises `UserError` if the model has nothing that divides so, a group would lie on two machines, or GPUs would not
    sum over NCCL.
    """
    if size == 1:
        return None
    hidden, local = model.fast_mlp_hidden, world.launch.local_size
    if not model.num_suffix_blocks:
        raise UserError(f"parallelism.state is {size}, but the model has no fast weights to divide; use 1")
    if hidden % size:
        raise UserError(f"the fast MLPs have {hidden} hidden units; parallelism.state is {size}, use a divisor of that")
    if local % size:
        raise UserError(f"a machine has {local} ranks; parallelism.state is {size}, use a divisor of that")
    kind = torch.device(device).type
    if kind == "cuda" and "cuda:nccl" not in (backends := dist.get_backend_config()):
        raise UserError(f"parallelism.state needs NCCL between GPUs, and the ranks were joined over {backends}")
    return group_of(torch.arange(world.size).view(-1, size).tolist(), world.deadline)
