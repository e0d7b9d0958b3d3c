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

from longread.inner_loop import Carry, scan
from tests.parity.check import TOLERANCES, Case, check, check_inner_loop, main, out_of_tolerance

HERE = Path(__file__).parent / "parity"
SHIPPED = sorted(path.parent for path in HERE.glob("*/config.json"))
ELSEWHERE = Path(os.environ.get("LONGREAD_PARITY_CASES", HERE.parents[2] / "shared" / "parity"))
OTHERS = sorted({path.parent.name: path.parent for path in ELSEWHERE.glob("*/config.json")}.items())


def test_enough_cases_are_shipped() -> None:
    assert len(SHIPPED) >= 6


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(path, dtype, id=f"{dtype}-{path.name}", marks=pytest.mark.slow if path in more else ())
        for dtype, more in ((torch.float64, []), (torch.float32, SHIPPED[2:]))
        for path in SHIPPED
    ],
)
def test_shipped_case(case: Path, dtype: torch.dtype) -> None:
    errors = check(case, dtype)
    assert not out_of_tolerance(errors, dtype), errors


@pytest.mark.slow
@pytest.mark.parametrize("case", [path for _, path in OTHERS], ids=lambda path: path.name)
def test_other_case(case: Path) -> None:
    errors = check(case)
    assert not out_of_tolerance(errors), errors


def test_a_wrong_number_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of number, disturbed by ten times its tolerance, fails its own kind and no other."""
    disturbed = [
        {"nll": "nll", "final.prime.w1": "update", "after.blocks.wq": "adamw"},
        {"grad.blocks.wk": "gradient", "inner_grad_norm": "inner norm"},
        {"prefix_output": "prefix", "trajectory.loss": "trajectory"},
    ]
    source = next(path for path in SHIPPED if "odd-window" in path.name)
    for i, kinds in enumerate(disturbed):
        case = shutil.copytree(source, tmp_path / str(i))
        tensors = load_file(case / "expected.safetensors")
        for name, kind in kinds.items():
            noise = torch.randn_like(tensors[name])
            scale = tensors[name].norm() / noise.norm() if kind in ("gradient", "prefix") else 1.0
            tensors[name] = tensors[name] + 10 * TOLERANCES[kind] * scale * noise
        save_file(tensors, case / "expected.safetensors")
        assert main([str(case)]) == 1
        line = capsys.readouterr().out
        assert "FAILED" in line
        found = {kind for kind in TOLERANCES if re.search(rf"\b{kind} \S+!", line)}
        also = {"adamw"} if "gradient" in kinds.values() else set()  # its step is made of the given gradient
        assert found == {*kinds.values(), *also}, line


def test_what_a_case_lacks_is_not_compared(tmp_path: Path) -> None:
    case = shutil.copytree(next(path for path in SHIPPED if "odd-window" in path.name), tmp_path / "case")
    tensors = load_file(case / "expected.safetensors")
    for name in ("loss_per_sequence", "chunk_loss", "nll_inner_lr_0", "outer_grad_norm", "inner_grad_norm"):
        del tensors[name]
    save_file(tensors, case / "expected.safetensors")
    errors = check(case)
    assert not out_of_tolerance(errors), errors
    assert "inner norm" not in errors


def test_a_mini_batch_without_targets_and_an_update_near_rounding(tmp_path: Path) -> None:
    """Both have a number that nothing can be divided by; the expected ones are our own, in float64."""
    case = shutil.copytree(next(path for path in SHIPPED if "odd-window" in path.name), tmp_path / "case")
    fields = json.loads((case / "config.json").read_text())
    fields["training"]["optimizer_inner"] |= {"lr": 1e-3, "clip_gradient": 0.0}
    (case / "config.json").write_text(json.dumps(fields))
    batch = load_file(case / "batch.safetensors")
    batch["loss_masks"][:, : fields["model"]["mini_batch_size"]] = 0
    save_file(batch, case / "batch.safetensors")

    exact = Case.read(case, torch.float64)
    (ids, targets, mask), model = exact.batch, exact.model
    lower, upper = model.empty_pasts(len(ids))
    hidden, _ = model.lower(ids, lower, start=0)
    carry = Carry(model.initial_fast_weights(len(ids)), upper)
    after = scan(model, carry, hidden, targets, mask, start=0, lr=1e-3, clip=None, order=0)
    expected = load_file(case / "expected.safetensors") | {"inner_grad_norm": after.grad_norm.float()}
    for index, name in enumerate(("w1", "w3", "w2")):
        final = torch.stack([weights[index] for weights in after.carry.fast], 1).mT
        expected[f"final.prime.{name}"] = final.float().contiguous()
    save_file(expected, case / "expected.safetensors")

    for dtype in (torch.float32, torch.float64):
        errors = check_inner_loop(Case.read(case, dtype))
        assert not out_of_tolerance(errors, dtype), errors
    expected["final.prime.w1"] += 1e-5
    save_file(expected, case / "expected.safetensors")
    assert out_of_tolerance(check_inner_loop(Case.read(case, torch.float32))) == ["update"]


def test_a_folder_that_is_no_case_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert main([str(tmp_path), str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().out.count("cannot be read") == 2
