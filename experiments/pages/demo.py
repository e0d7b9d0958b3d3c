"""What `make demo-train` measured with three seeds, from its own files."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from experiments.page import Data, Table, number
from experiments.results import between

SLUG = "demo-three-seeds"
READINGS = {
    "TTT-E2E, learning": ("e2e",),
    "TTT-E2E, the same weights read frozen": ("e2e", "frozen"),
    "SWA": ("swa",),
    "full attention": ("full",),
}
READ_ON = ((0, 128), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, 16384))


def tables(files: Data) -> Iterator[Table]:
    runs = [files[name] for name in sorted(files)]
    rows = []
    for name, path in READINGS.items():
        losses = [_at(run, path)["loss"] for run in runs]
        mean = number(statistics.mean(losses))
        rows.append([name, *map(number, losses), f"**{mean}**" if not rows else mean])
    head = [f"seed {run['seed']}" for run in runs]
    yield Table("Held-out nats per byte:", ["", *head, "mean"], rows)
    by_position = {
        name: _means([_at(run, path)["loss_by_position"] for run in runs]) for name, path in READINGS.items()
    }
    yield Table(
        "The same by position, mean over seeds:",
        ["", *(between(*ends) for ends in next(iter(by_position.values())))],
        [[name, *map(number, bins.values())] for name, bins in by_position.items()],
    )
    further = {reading: _means([run["e2e_reading_on"][reading] for run in runs]) for reading in ("learning", "frozen")}
    yield Table(
        "TTT-E2E to 16K bytes, mean over seeds:",
        ["", *(between(*ends) for ends in READ_ON)],
        [[name, *(number(bins[ends]) for ends in READ_ON)] for name, bins in further.items()],
    )


def _at(run: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    found = run["methods"]
    for name in path:
        found = found[name]
    return found


def _means(runs: list[list[dict[str, Any]]]) -> dict[tuple[int, int], float]:
    """(from, to) -> mean of the losses of all runs there."""
    return {
        (bins[0]["from"], bins[0]["to"]): statistics.mean(entry["loss"] for entry in bins)
        for bins in zip(*runs, strict=True)
    }
