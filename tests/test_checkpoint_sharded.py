"""Checkpoints that several ranks write together, and the optimizer's moments read back at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longread import checkpoint
from longread.checkpoint import CheckpointWriter, training
from longread.parallel import DividedRows, Launch, World
from longread.parallel.rows import row_mesh
from tests.ranks import Ranks
from tests.test_checkpoint import INNER, equal, make_model

SIZE = 3
SHAPES = {"even": (6, 3), "uneven": (7, 2, 2), "short": (2,), "one": (1, 5)}
"""Rows for each of three ranks; rows that do not divide; fewer than there are ranks."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(SIZE, tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints of three ranks; tests copy it before they damage it."""
    run = tmp_path_factory.mktemp("saved") / "run"
    for step in (1, 2):
        ranks.run(save, run, step, SIZE)
    return run


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}


def moments(step: int) -> dict[str, Tensor]:
    """Whole; every number is another."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, shape in SHAPES.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{moment}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        found[f"{name}.step"] = torch.tensor(float(step))
    return found


def own(rows: DividedRows, step: int) -> dict[str, Tensor]:
    """Of `moments` those of this rank's rows, as `torch.chunk` divides."""
    found = {}
    for name, whole in moments(step).items():
        parts = [whole] if whole.ndim == 0 else list(whole.chunk(rows.count))
        parts += [whole[:0]] * (rows.count - len(parts)) if whole.ndim else []
        found[name] = whole if whole.ndim == 0 else parts[rows.index]
    return found


@cache
def world() -> World:
    return World(Launch.from_environment(), deadline=20)


@cache
def divided(count: int) -> DividedRows:
    """Rows of parameters that `count` neighbours divide."""
    return DividedRows(parameters(), row_mesh(SIZE, count, "cpu"))


@cache
def writer(run: Path, count: int) -> CheckpointWriter:
    return CheckpointWriter(run, world(), divided(count))


def begin(saving: CheckpointWriter, step: int, count: int) -> None:
    saving.save(
        step,
        model=make_model(step),
        inner=INNER,
        optimizer=own(divided(count), step),
        state={"tokens": 10 * step},
        tokenizer_fingerprint="abc",
    )


def save(run: Path, step: int, count: int) -> Path | None:
    begin(writer(run, count), step, count)
    return writer(run, count).wait()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def read(path: Path, count: int) -> bool:
    found = checkpoint.read_checkpoint(path, world(), divided(count))
    return found.step == 2 and found.state["tokens"] == 20 and same(found.optimizer, own(divided(count), 2))


@pytest.mark.parametrize("written", [SIZE, 1])
def test_moments_are_read_at_any_number_of_ranks(ranks: Ranks, tmp_path: Path, saved: Path, written: int) -> None:
    """Rows that three divide, and rows that each has whole, of which one writes; the model is one that opens."""
    if written == 1:
        saved = tmp_path
        ranks.run(save, saved, 2, 1)
    path = checkpoint.newest_checkpoint(saved)
    assert path is not None
    assert path.name == "step-00000002"
    pieces = {f"optimizer-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    others = {"model.safetensors", "config.json", "state.json", "manifest.json", "COMMITTED"}
    assert {file.name for file in path.iterdir()} == pieces | others
    assert sum((path / name).stat().st_size for name in pieces) < 2 * sum(x.nbytes for x in moments(2).values()) + 9000
    found = checkpoint.read_checkpoint(path)
    assert same(found.optimizer, moments(2))
    assert found.state["tokens"] == 20
    loaded = checkpoint.load_model(saved)
    assert equal(loaded.model, make_model(2))
    assert loaded.metadata["provenance"] == {"step": 2}
    for count in (1, SIZE):
        assert ranks.run(read, path, count) == [True] * SIZE


def test_what_one_process_wrote_is_read_in_rows(ranks: Ranks, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as saving:
        saving.save(2, model=make_model(2), inner=INNER, optimizer=moments(2), state={"tokens": 20})
        path = saving.newest
    other = training.write_checkpoint(
        tmp_path / "other", 2, model=make_model(2), inner=INNER, optimizer=moments(2), state={"tokens": 20}
    )
    assert path is not None
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }
    assert "optimizer.safetensors" in {file.name for file in path.iterdir()}
    assert ranks.run(read, path, SIZE) == [True] * SIZE
