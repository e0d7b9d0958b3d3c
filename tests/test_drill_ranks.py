"""Runs of several ranks that meet a fault become the run that met none (tests/drill): a few here, all as slow tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.drill.__main__ import main
from tests.drill.faults import FULL, WAITED, Fault, flip_newest
from tests.drill.injection import Injection
from tests.drill.run import Drill


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(tmp_path_factory.mktemp("drill"))


def survived(drill: Drill, injection: Injection, **options: Any) -> None:
    fault = Fault("one of a few", (injection,), **options)
    assert drill.meet(fault, random.Random(1))["difference"] <= (0 if fault.exact else 1e-12)


def test_a_rank_is_killed_in_a_sum(drill: Drill) -> None:
    survived(drill, Injection("kill", 1, "norm", 8), says=WAITED)


@pytest.mark.slow
def test_a_rank_is_killed_while_old_checkpoints_are_deleted(drill: Drill) -> None:
    survived(drill, Injection("kill", 0, "disk", drill.counts[0]["disk"] - 10))


def test_a_disk_is_full_and_one_rank_goes_on(drill: Drill) -> None:
    survived(drill, Injection("limit files", 1, "gradient", 5), says=FULL, ranks=1, exact=False)


def test_a_byte_is_wrong(drill: Drill) -> None:
    warns = "going back to step-0000000[36]"
    survived(drill, Injection("kill all", 0, "gradient", 11), damage=flip_newest, warns=warns)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["forks", "torchrun"])
def test_every_fault_is_survived(by: str, tmp_path: Path) -> None:
    assert main(["--seed", "2", "--by", by, "--directory", str(tmp_path)]) == 0
