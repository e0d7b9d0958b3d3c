"""Whether a run that met a fault is the run that met none, and nothing is left of the fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.test_train import rows_of, without_timing

TOLERANCE = 1e-12
"""Of sums in another order, in float64."""


class Wrong(Exception):
    """The drill has found what must not be."""


def check_survivors(run: Path, whole: Path, damaged: str = "", exact: bool = True) -> None:
    """Every checkpoint that says it is finished is that of the undisturbed run, but for the one that was damaged."""
    for marker in (run / "checkpoints").glob("*/COMMITTED"):
        name = marker.parent.name
        for expected in (whole / "checkpoints" / name).glob("*.safetensors") if name not in damaged else ():
            found = marker.parent / expected.name
            if exact and found.read_bytes() != expected.read_bytes():
                raise Wrong(f"{found} is another than that of the undisturbed run")


def difference(run: Path, whole: Path) -> float:
    """0 if losses and weights are bit for bit those of the undisturbed run, else the largest relative difference."""
    rows, others = (without_timing(rows_of(each)) for each in (run, whole))
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        raise Wrong(f"{run} has the steps {[row['step'] for row in rows]}")
    worst = 0.0
    for row, other in zip(rows, others, strict=True):
        if row.keys() != other.keys():
            raise Wrong(f"step {row['step']} says {sorted(row)}")
        worst = max(worst, *(_apart(row[name], other[name]) for name in row))
    weights = [each / "model" / "model.safetensors" for each in (run, whole)]
    if weights[0].read_bytes() != weights[1].read_bytes():
        found, expected = map(load_file, weights)
        apart = [float((found[name] - held).norm() / held.norm()) for name, held in expected.items()]
        worst = max(worst, *apart, 1e-300)  # bytes that differ are never the same
    return worst


def _apart(value: Any, other: Any) -> float:
    if value == other:
        return 0.0
    return abs(value - other) / abs(other) if isinstance(other, float) and other else float("inf")


def check_finished(run: Path, last: str) -> None:
    """The newest two checkpoints stay, and nothing else; the one before the last is of where the run was stopped."""
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    if len(found) != 2 or found[-1] != last:
        raise Wrong(f"{run} keeps {found}")
    if left := list(_temporaries(run)):
        raise Wrong(f"{left} are left over")


def _temporaries(run: Path) -> Iterator[Path]:
    yield from run.rglob(".*")
