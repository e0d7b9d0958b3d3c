"""Rows of figures, and the file that collects them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longread import record
from longread.bench.cases import PARALLEL, UNITS, Case
from longread.bench.machine import versions
from longread.config import Recompute, UserError
from longread.files import atomic_files

Row = dict[str, Any]
KEYS = (
    "measure",
    "method",
    "size",
    "context",
    "sequences",
    "value",
    "unit",
    "n",
    "spread",
    "peak_gib",
    "commit",
    "versions",
)
_IDENTITY = KEYS[:5]
_DIGITS = {"train_tokens_per_s": 1, PARALLEL: 1, "first_step_s": 2, "prefill_ms_per_1k": 3, "decode_tokens_per_s": 2}
_SECONDS = 3
"""Digits of what a process does first."""


def make_row(
    case: Case,
    values: Sequence[float],
    peak_gib: float | None,
    device: torch.device,
    *,
    recompute: Recompute | None = None,
    parts: Mapping[str, float] | None = None,
    blocks: int | None = None,
) -> Row:
    """The row of a case that was measured len(values) times: the median, and the range where there is one.

    A row of training says what it computed again (`recompute`), which the others have no word for; one of a fresh
    process may name seconds beside its value (`parts`); one that was taken of a single block says how many times that
    was counted (`blocks`).
    """
    digits = _DIGITS.get(case.measure, _SECONDS)
    row = {
        "measure": case.measure,
        "method": case.method,
        "size": case.size,
        "context": case.context,
        "sequences": case.sequences,
        "value": round(statistics.median(values), digits),
        "unit": UNITS[case.measure],
        "n": len(values),
        "spread": [round(min(values), digits), round(max(values), digits)] if len(values) > 1 else None,
        "peak_gib": peak_gib,
        "commit": _commit(),
        "versions": versions(device),
    }
    if parts is not None:
        row["parts"] = {name: round(value, _SECONDS) for name, value in parts.items()}
    if blocks is not None:
        row["blocks"] = blocks
    return row if recompute is None else row | {"recompute": recompute}


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows and new ones; a new one takes the place of the old one about the same thing on the same device."""
    return list({_identity(row): row for row in (*old, *new)}.values())


def _identity(row: Row) -> tuple[Any, ...]:
    parallel = (row.get(key) for key in ("gpus", "update", "state_parallel"))
    return *(row[key] for key in _IDENTITY), *parallel, row["versions"].get("device")


def read_rows(path: str | Path, *, missing_ok: bool = False) -> list[Row]:
    """Rows as `write_rows` wrote them. Raises `UserError` if that is not what the file holds."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return []
        raise UserError(f"there is no file {path}; give one that `longread bench --json` wrote") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= set(KEYS) for row in rows):
        raise UserError(f"{path} is no list of rows that `longread bench` wrote; give another file")
    return rows


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes or replaces the file, whole or not at all."""
    with atomic_files(Path(path)) as (temporary,):
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _commit() -> str | None:
    commit = record.code_commit()
    if commit is None:
        return None
    name, plus, changes = commit.partition("+")
    return name[:7] + plus + changes
