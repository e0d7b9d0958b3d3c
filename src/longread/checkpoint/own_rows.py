"""Which moments of a checkpoint, and which rows of them, are a rank's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longread.config import UserError
from longread.parallel import DividedRows


def row_range(length: int, rows: DividedRows) -> tuple[int, int]:
    """First of this rank's rows, and the one after its last; as `torch.chunk` divides."""
    each = -(-length // rows.count)
    return min(rows.index * each, length), min((rows.index + 1) * each, length)


def is_moment(name: str, shape: Sequence[int], rows: DividedRows, where: Path) -> bool:
    """Whether it is one of a parameter in `rows`. Raises `UserError` if its shape is not the parameter's."""
    parameter = rows.parameters.get(name.rpartition(".")[0])
    if parameter is None:
        return False
    if len(shape) and tuple(shape) != tuple(parameter.shape):
        raise UserError(
            f"{where}: {name} has shape {tuple(shape)}, but its parameter {tuple(parameter.shape)}; "
            "it is the optimizer of another model"
        )
    return True
