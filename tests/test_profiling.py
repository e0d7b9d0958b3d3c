"""Traces of steps: which steps, which ranges, what becomes of large ones, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longread.cli import main
from longread.config import UserError
from longread.data import TokenDataset
from longread.train import ProfiledSteps, profiling, train
from longread.train.profiling import RANGES, own_time
from tests.test_train import CONFIG, change, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


def ranges_of(trace: Any) -> dict[str, int]:
    """How often each range of ours, and of the profiler's steps, was entered."""
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


def test_a_profile_has_the_ranges_of_its_steps(tmp_path: Path, data: TokenDataset) -> None:
    """Four mini-batches in segments of two: three inner steps, two of them again, and the block below again."""
    config = change(recompute="sqrt", micro_batch_size=4, steps=4, evaluate_every=None)
    train(config, data, tmp_path / "run", device="cpu", profiled=ProfiledSteps(2, 3))
    found = {path.name: path for path in (tmp_path / "run" / "profile").iterdir()}
    assert found.keys() == {"rank-0.json", "rank-0.txt"}
    ranges = ranges_of(json.loads(found["rank-0.json"].read_text()))
    assert {name: count for name, count in ranges.items() if name in RANGES} == {
        "outer step": 2,
        "inner step": 2 * (3 + 2),
        "recompute": 2 * (1 + 2),
        "reduce": 2,
        "update": 2,
        "gather": 2,
    }
    table = found["rank-0.txt"].read_text()
    assert table.startswith("steps 2 to 3\n")
    rows = {line[:12].strip(): line[12:].split() for line in table.splitlines()[3:9]}
    assert rows["inner step"][0] == "10"
    assert float(rows["inner step"][1]) > 0
    assert "aten::" in table
    train(config, data, tmp_path / "plain", device="cpu")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "plain")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_first_step_may_be_profiled_and_large_traces_are_compressed(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "LARGE", 1000)
    train(change(steps=2, evaluate_every=None), data, tmp_path / "run", device="cpu", profiled=ProfiledSteps(1, 1))
    names = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert names == {"rank-0.json.gz", "rank-0.txt"}
    with gzip.open(tmp_path / "run" / "profile" / "rank-0.json.gz") as file:
        assert ranges_of(json.load(file))["outer step"] == 1


def test_a_profile_that_cannot_be_written_costs_no_run(tmp_path: Path, data: TokenDataset) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    with pytest.warns(UserWarning, match="no profile: cannot write .*rank-0.txt"):
        result = train(change(steps=2), data, tmp_path / "run", device="cpu", profiled=ProfiledSteps(1, 1))
    assert result.step == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("12:10", "profiled steps 12:10 end before they begin; give FIRST:LAST"),
        ("0:0", "there is no step 0 to profile; steps are counted from 1"),
        ("-1:2", "there is no step -1 to profile"),
        ("first", "profiled steps are 'first'; give FIRST:LAST, as in 10:12"),
        ("1:", "profiled steps are '1:'"),
        ("6:7", "there is no step 7 to profile: the run has 6; name earlier ones"),
    ],
)
def test_what_cannot_be_profiled(
    text: str, reason: str, tmp_path: Path, data: TokenDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "toy", "--data", str(data.directory), "--out", str(tmp_path / "run"), "--steps", "6", "--device", "cpu"
    assert main(["train", *options, f"--profile-steps={text}"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_steps_before_a_resumption_are_past(tmp_path: Path, data: TokenDataset) -> None:
    assert (ProfiledSteps.parse("3"), ProfiledSteps.parse("2:4")) == (ProfiledSteps(3, 3), ProfiledSteps(2, 4))
    train(change(steps=4), data, tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="step 4 cannot be profiled: the run goes on with step 5; name later ones"):
        train(CONFIG, data, tmp_path / "run", device="cpu", resume=True, profiled=ProfiledSteps(4, 5))
    train(CONFIG, data, tmp_path / "run", device="cpu", resume=True, profiled=ProfiledSteps(5, 5))
    assert (tmp_path / "run" / "profile" / "rank-0.json").exists()


def test_time_belongs_to_the_range_that_is_named_first() -> None:
    spans = {"a": [(2.0, 3.0)], "b": [(1.0, 4.0), (6.0, 7.0)], "c": [(0.0, 10.0)], "d": []}
    assert own_time(spans) == {"a": 1.0, "b": 3.0, "c": 6.0, "d": 0.0}
