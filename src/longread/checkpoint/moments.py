"""The optimizer's moments in a checkpoint: whole in one file, or the rows of every rank in a file of its own.

    optimizer.safetensors                   one process wrote it
    optimizer-00001-of-00004.safetensors    four ranks did (longread.checkpoint.sharded)

Either is read by any number of ranks. Names are `parameter.moment`; what has no dimension, the number of steps, is the
same on all ranks.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from longread.checkpoint.own_rows import is_moment, row_range
from longread.files import open_tensors, read_tensors
from longread.parallel import DividedRows

OPTIMIZER_FILE = "optimizer.safetensors"
KIND = "optimizer"


def read_moments(path: Path, rows: DividedRows | None = None) -> dict[str, Tensor]:
    """The moments in a checkpoint: of the rows of this rank, or all of them whole.

    Each rank reads the rows that are its own, and none waits for another. What is no moment of `rows` is passed over.
    `verify_checkpoint` comes before: bytes are not checked here.

    Raises `UserError` if a file or a part of a tensor is missing, or if shapes are not those of `rows`.
    """
    whole = path / OPTIMIZER_FILE
    if not whole.exists():
        from longread.checkpoint.sharded import read_pieces  # with it comes DCP, which takes two seconds to import

        return read_pieces(path, rows)
    if rows is None or rows.count == 1:
        tensors, _ = read_tensors(whole, kind=KIND)
        return {name: x for name, x in tensors.items() if rows is None or is_moment(name, x.shape, rows, path)}
    found = {}
    with open_tensors(whole, kind=KIND) as (file, _):
        for name in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(name)
            shape = part.get_shape()
            if not is_moment(name, shape, rows, path):
                continue
            if not shape:
                found[name] = file.get_tensor(name)
                continue
            first, end = row_range(shape[0], rows)
            found[name] = part[first:end] if first < end else part[:1][:0]
    return found
