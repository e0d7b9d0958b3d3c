"""The official implementation's numbers, case by case (tests/parity/README.md says what they are)."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.check import TOLERANCES, check, main, out_of_tolerance

HERE = Path(__file__).parent / "parity"
SHIPPED = sorted(path.parent for path in HERE.glob("*/config.json"))
ELSEWHERE = Path(os.environ.get("LONGREAD_PARITY_CASES", HERE.parents[2] / "shared" / "parity"))
OTHERS = sorted({path.parent.name: path.parent for path in ELSEWHERE.glob("*/config.json")}.items())


def test_enough_cases_are_shipped() -> None:
    assert len(SHIPPED) >= 6


@pytest.mark.parametrize("case", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shipped_case(case: Path, dtype: torch.dtype) -> None:
    errors = check(case, dtype)
    assert not out_of_tolerance(errors, dtype), errors


@pytest.mark.slow
@pytest.mark.parametrize("case", [path for _, path in OTHERS], ids=lambda path: path.name)
def test_other_case(case: Path) -> None:
    errors = check(case)
    assert not out_of_tolerance(errors), errors


def test_a_wrong_number_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of number, disturbed by ten times its tolerance, fails its own kind."""
    disturbed = {
        "nll": "nll",
        "grad.blocks.wk": "gradient",
        "final.prime.w1": "update",
        "inner_grad_norm": "inner norm",
        "prefix_output": "prefix",
        "after.blocks.wq": "adamw",
        "trajectory.loss": "trajectory",
    }
    source = next(path for path in SHIPPED if "odd-window" in path.name)
    for name, kind in disturbed.items():
        case = tmp_path / name
        shutil.copytree(source, case)
        tensors = load_file(case / "expected.safetensors")
        noise = torch.randn_like(tensors[name])
        scale = tensors[name].norm() / noise.norm() if kind in ("gradient", "prefix") else 1.0
        tensors[name] = tensors[name] + 10 * TOLERANCES[kind] * scale * noise
        save_file(tensors, case / "expected.safetensors")
        assert main([str(case)]) == 1
        line = capsys.readouterr().out
        assert "FAILED" in line
        assert re.search(rf" {kind} \S+!", line), line


def test_a_folder_that_is_no_case_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert main([str(tmp_path), str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().out.count("cannot be read") == 2
