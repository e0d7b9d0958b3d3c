"""Runs of several ranks that meet a fault become the run that met none (tests/drill): a few here, all as slow tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.drill.__main__ import main
from tests.drill.faults import FULL, WAITED, Fault, flip_newest
from tests.drill.injection import Injection
from tests.drill.run import Drill

FEW = [
    Fault("killed in a sum", (Injection("kill", 1, "norm", 8),), says=WAITED),
    Fault("killed while old checkpoints are deleted", (Injection("kill", 0, "disk", 109),)),
    Fault("a full disk", (Injection("limit files", 1, "gradient", 5),), ranks=1, exact=False, says=FULL),
    Fault(
        "a wrong byte",
        (Injection("kill all", 0, "gradient", 11),),
        damage=flip_newest,
        warns="going back to step-00000003|going back to step-00000006",
    ),
]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize("fault", FEW, ids=lambda fault: fault.name)
def test_a_run_survives(drill: Drill, fault: Fault) -> None:
    row = drill.meet(fault, random.Random(1))
    assert row["difference"] <= (0 if fault.exact else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["forks", "torchrun"])
def test_every_fault_is_survived(by: str, tmp_path: Path) -> None:
    assert main(["--seed", "2", "--by", by, "--directory", str(tmp_path)]) == 0
