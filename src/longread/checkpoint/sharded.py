"""The optimizer's moments divided among ranks: copied, written and read through torch.distributed.checkpoint.

Each rank holds moments of its rows (`longread.parallel.rows`). As DTensors they say which rows of which tensor these
are; where several ranks hold the same, DCP lets one of them write.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from longread.checkpoint.own_rows import is_moment, row_range
from longread.checkpoint.storage import PieceReader, PieceWriter
from longread.parallel import DividedRows, World


def staged_moments(moments: Mapping[str, Tensor], rows: DividedRows, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Copies of the moments of this rank's rows, on the CPU.

    Args:
        moments: of `rows.own`, as `parameter.moment`.
        mesh: the `row_mesh` of `rows`, on CPUs.
    """
    return {
        name: _placed(_copied(moment), rows.parameters[name.rpartition(".")[0]].shape, mesh)
        for name, moment in moments.items()
    }


def _copied(tensor: Tensor) -> Tensor:
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach().to("cpu", copy=True)


def _placed(held: Tensor, shape: torch.Size, mesh: DeviceMesh) -> Tensor:
    """A rank's rows as what they are, a part of a tensor of this shape."""
    if held.ndim == 0:
        return held
    stride = torch.empty(shape, device="meta").stride()
    placements = [*([Replicate()] * (mesh.ndim - 1)), Shard(0)]
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=shape, stride=stride)


def write_moments(directory: Path, moments: Mapping[str, Tensor], step: int, world: World) -> Path:
    """Writes this rank's share of what `staged_moments` gave into a file, whose path it returns.

    All ranks of `world` call it together. What fails on any is raised on all: there itself, elsewhere as `RankFailed`.
    """
    writer = PieceWriter(directory, step, world.say)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    errors: dict[int, BaseException] = {}
    try:
        with world.waiting("the rows of the others"):
            save(dict(moments), storage_writer=writer, planner=planner, process_group=world.votes)
    except CheckpointException as error:  # of the plan; all ranks get it
        errors = {rank: failure[0] for rank, failure in error.failures.items()}
    with world.together("writing its rows"):
        if failure := writer.error or errors.get(world.rank):
            raise failure
    return writer.file


def read_pieces(path: Path, rows: DividedRows | None) -> dict[str, Tensor]:
    """`longread.checkpoint.moments.read_moments` of what several ranks wrote."""
    reader, found = PieceReader(path), {}
    for name, saved in reader.tensors.items():
        shape, dtype = saved.size, saved.properties.dtype
        if rows is not None and not is_moment(name, shape, rows, path):
            continue
        if rows is None or rows.mesh is None or not shape:
            found[name] = torch.empty(shape, dtype=dtype)
        else:
            first, end = row_range(shape[0], rows)
            held = torch.empty(end - first, *shape[1:], dtype=dtype, device=rows.mesh.device_type)
            found[name] = _placed(held, shape, rows.mesh)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # meant so: no rank waits for another
            load(found, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in found.items()}
