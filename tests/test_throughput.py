"""What a step cost: operations as they run, seconds of the slowest rank, utilisation of a known peak."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.data import TokenDataset
from longread.flops import step_flops
from longread.planning import GPUS, peak_flops
from longread.record import TIMING_FIELDS
from longread.train import train
from longread.train.progress import describe
from longread.train.seen import Seen, seen_by_all
from longread.train.step_clock import PARTS, StepClock
from longread.train.throughput import Throughput
from tests.products import Products
from tests.ranks import Ranks
from tests.test_flops import plain_loss  # noqa: F401
from tests.test_train import CONFIG, change, make_data, rows_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.usefixtures("plain_loss")
@pytest.mark.parametrize(
    "fields",
    [
        {"recompute": "sqrt", "micro_batch_size": 1},
        {"meta_gradient": "first-order", "trained_blocks": 1},
        {"truncate_after": 2},
        {"loss": "static", "recompute": "blocks"},
    ],
)
def test_operations_of_a_row_are_those_that_ran(fields: Any, tmp_path: Path, data: TokenDataset) -> None:
    config = change(**{"steps": 1, "evaluate_every": None, "recompute": "none"} | fields)
    with Products(kernels=True) as counted:
        train(config, data, tmp_path / "run", device="cpu")
    (row,) = rows_of(tmp_path / "run")
    assert row["flops"] == counted.flops["products"]
    assert row["flops"] == row["inner_flops"] + row["outer_flops"] + row["recomputed_flops"]
    assert (row["inner_flops"] == 0) == (config.loss == "static")
    assert (row["recomputed_flops"] == 0) == (config.recompute == "none")


def test_seconds_of_parts_lie_within_the_step(tmp_path: Path, data: TokenDataset) -> None:
    """The update's with the next one, as on a GPU."""
    train(change(steps=3), data, tmp_path / "run", device="cpu")
    rows = rows_of(tmp_path / "run")
    for row in rows:
        assert 0 < row["gradient_seconds"] < row["seconds"]
        assert row.keys().isdisjoint({"mfu", "reduce_seconds", "gather_seconds", "peak_memory_bytes"})
    assert ["update_seconds" in row for row in rows] == [False, True, True]
    assert all(row["update_seconds"] < before["seconds"] for before, row in itertools.pairwise(rows))
    assert {f"{part}_seconds" for part in PARTS} < set(TIMING_FIELDS)


def test_utilisation_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    made = Throughput(CONFIG, 1, torch.device("cuda"))
    plain, again = (made.fields(100, 2.0, {}, recompute) for recompute in ("none", "step"))
    assert again["recomputed_flops"] == again["flops"] - plain["flops"] > 0
    assert again["mfu"] == plain["mfu"]
    assert "  MFU 38%  " in describe({"loss": 1.0, "tokens_per_second": 2.0, "grad_norm": 3.0, "mfu": 0.383})


def test_other_mixers_are_not_counted(tmp_path: Path, data: TokenDataset) -> None:
    config = change(loss="static", model__num_suffix_blocks=0)
    config = change(config, model__mixer="mamba2", steps=1)
    assert step_flops(config, "none") is None
    train(config, data, tmp_path / "run", device="cpu")
    assert "flops" not in rows_of(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_peaks_are_found_by_the_names_of_drivers(device: str, name: str | None) -> None:
    assert peak_flops(device) == (None if name is None else GPUS[name].flops)


def test_a_part_that_fails_leaves_no_time() -> None:
    clock = StepClock(CPU)
    with pytest.raises(ValueError, match="no"), clock.part("gradient"):
        raise ValueError("no")
    with clock.part("update"):
        time.sleep(0.002)
    found = clock.take()
    assert found.keys() == {"update"}
    assert found["update"] >= 0.002
    assert clock.take() == {}


def test_a_gpu_tells_its_own_seconds_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of it after the last wait comes with the next step. Here its clock ticks once an event."""
    ticks = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "of cuda:1"
            self.at = next(ticks) ** 2

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    clock = StepClock(torch.device("cuda:1"))
    found = []
    for _ in range(2):
        for part in ("gradient", "reduce"):
            with clock.part(part):
                pass
        clock.settle()
        with clock.part("update"):
            pass
        found.append(clock.take())
    assert found == [{"gradient": 1e-3, "reduce": 5e-3}, {"update": 9e-3, "gradient": 13e-3, "reduce": 17e-3}]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def of_two_ranks(data: Path, out: Path) -> None:
    train(change(steps=3, evaluate_every=None), TokenDataset.open(data), out, device="cpu", deadline=60.0)


def test_ranks_tell_operations_and_seconds_of_all(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    ranks.run(of_two_ranks, data.directory, tmp_path / "two")
    train(change(steps=3, evaluate_every=None), data, tmp_path / "one", device="cpu")
    for row, alone in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert row["flops"] == alone["flops"] > 0
        assert 0 < sum(row.get(f"{part}_seconds", 0.0) for part in ("gradient", "reduce")) < row["seconds"]
    assert {f"{part}_seconds" for part in PARTS} <= row.keys()


def test_seconds_of_ranks_are_those_that_nobody_waits_in() -> None:
    """The second rank computes longer, so the first waits for it in the sum."""
    first = Seen(loss=1.0, peak=5, gradient=2.0, reduce=1.25, update=0.5, gather=0.25)
    second = Seen(loss=2.0, peak=4, gradient=3.0, reduce=0.25, update=0.75, gather=0.125)
    found = seen_by_all([first, second])
    assert found.parts == {"gradient": 3.0, "reduce": 0.25, "update": 0.75, "gather": 0.125}
    assert (found.loss, found.peak) == (3.0, 5)


def test_utilisation_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    one, two = (Throughput(CONFIG, size, torch.device("cuda")).fields(100, 2.0, {}, "none") for size in (1, 2))
    assert one["flops"] == two["flops"] > 0
    assert one["mfu"] == 2 * two["mfu"] == one["flops"] / 2.0 / GPUS["h200"].flops
    assert one["tokens_per_second"] == 50.0


@pytest.mark.gpu
def test_on_a_gpu_the_update_is_told_with_the_next_step(tmp_path: Path, data: TokenDataset) -> None:
    train(CONFIG, data, tmp_path / "run", device="cuda")
    first, *others = rows_of(tmp_path / "run")
    assert "update_seconds" not in first
    for row in others:
        assert 0 < row["update_seconds"] < row["seconds"]
        assert 0 < row["gradient_seconds"] < row["seconds"]
        assert ("mfu" in row) == (peak_flops(torch.cuda.get_device_name()) is not None)
