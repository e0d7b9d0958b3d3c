"""`longread bench train --gpus`: the sum of ranks is right or no time is taken; figures that follow from rows."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.bench import Case, Machine, Outcome, gate, markdown, merged, parallel, plan, ranks, run_cases
from longread.bench.gate import GateFailed, GateResult
from longread.bench.parallel import measure_parallel
from longread.bench.ranks import RankMeasurement, Steps
from longread.bench.report import share_of_peak, work_per_token
from longread.cli import main
from longread.config import Parallelism, UserError
from longread.parallel import DividedRows, joined
from tests.ranks import Ranks

CPU = torch.device("cpu")
TWO = Case("train", "e2e", "toy", 64, gpus=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as pair:
        yield pair


def checked(update: Any, scale: float = 1.0, lost: str = "", state: int = 1) -> tuple[bool, str]:
    """The gate of two ranks; with sums that are `scale` times too large, or rows of `lost` that never go round."""
    gate._VOCABULARY, gate._WIDTH, gate._MINI_BATCH = 100, 64, 32
    right = DividedRows.reduce, DividedRows.gather

    def reduce(rows: DividedRows, weight: float) -> None:
        right[0](rows, weight * (scale if rows.mesh is not None else 1.0))

    def gather(rows: DividedRows) -> None:
        if lost != "all":
            right[1](rows)

    DividedRows.reduce, DividedRows.gather = reduce, gather  # type: ignore[method-assign]
    try:
        with joined("cpu") as (world, _):
            verdict = ranks.check_sum(TWO, CPU, world, Parallelism(update=update, state=state))
    finally:
        DividedRows.reduce, DividedRows.gather = right  # type: ignore[method-assign]
    return verdict.passed, str(verdict)


def timed(repeats: int) -> Steps:
    with joined("cpu") as (world, _):
        return ranks.time_steps(dataclasses.replace(TWO.config, batch_size=2), CPU, world, Parallelism(), repeats)


@pytest.mark.parametrize("update", ["shared", pytest.param("replicated", marks=pytest.mark.slow)])
def test_the_sum_of_two_ranks_is_the_gradient_of_one(pair: Ranks, update: str) -> None:
    for passed, said in pair.run(checked, update):
        assert passed, said
        assert f"gradients of 2 ranks, e2e, update {update}, float32: right" in said


def test_two_ranks_that_divide_fast_mlps_have_the_gradient_of_one(pair: Ranks) -> None:
    for passed, said in pair.run(checked, "shared", 1.0, "", 2):
        assert passed, said
        assert "gradients of 2 ranks, e2e, update shared, state 2, float32: right" in said


@pytest.mark.parametrize(
    "wrong", [{"scale": 1.001}, pytest.param({"scale": 0.5}, marks=pytest.mark.slow), {"lost": "all"}]
)
def test_a_wrong_sum_is_red_on_all_ranks(pair: Ranks, wrong: dict[str, Any]) -> None:
    found = pair.run(checked, "shared", wrong.get("scale", 1.0), wrong.get("lost", ""))
    assert [passed for passed, _ in found] == [False, False]


def test_ranks_agree_on_how_long_a_step_takes(pair: Ranks) -> None:
    first, second = pair.run(timed, 3)
    assert first == second
    assert len(first.seconds) == 3
    assert min(first.seconds) > 0
    assert (first.micro_batch_size, first.recompute) == (1, "none")


def test_shares_of_random_tokens_are_the_same_batch_for_any_number_of_ranks() -> None:
    tokens = ranks.RandomTokens(Case("train", "swa", "toy", 64, sequences=4).config)
    whole = tokens.batch(3)
    assert whole.input_ids.shape == whole.loss_mask.shape == (4, 64)
    halves = [tokens.batch(3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.target_ids for half in halves]), whole.target_ids)
    assert not torch.equal(tokens.batch(4).input_ids, whole.input_ids)


def test_the_command_measures_on_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun's launcher, the gate, two ranks and one alone, the row and the page."""
    for name, value in {
        "_VOCABULARY": 100,
        "_WIDTH": 64,
        "_MINI_BATCH": 32,
        "_TOKENS": 128,
    }.items():  # of the gate before the ranks
        monkeypatch.setattr(gate, name, value)
    monkeypatch.setattr("longread.bench.run.measure_machine", lambda device: Machine("one", "product", 1e11, 1e10))
    imported = functools.partial(parallel.LaunchConfig, start_method="forkserver")  # spawned ranks would import anew
    monkeypatch.setattr(parallel, "LaunchConfig", imported)
    path = tmp_path / "rows.json"
    arguments = ["bench", "train", "--device", "cpu", "--gpus", "2", "--sizes", "toy", "--methods", "swa"]
    arguments += ["--contexts", "64", "--sequences", "1", "--repeats", "2", "--json", str(path)]
    assert main(arguments) == 0
    (row,) = json.loads(path.read_text())
    assert (row["measure"], row["gpus"], row["update"], row["n"]) == ("parallel_train_tokens_per_s", 2, "shared", 2)
    assert row["ratio"] == pytest.approx(row["value"] / row["one_gpu"], rel=1e-2)
    assert row["estimated_gib"] is None
    page = capsys.readouterr().out
    assert "- gradients of 2 ranks, swa, update shared, float32: right" in page
    assert "## Training on several GPUs" in page


# What follows, without processes.


def measured(monkeypatch: pytest.MonkeyPatch, found: RankMeasurement, case: Case = TWO) -> Any:
    monkeypatch.setattr(parallel, "on_ranks", lambda *_: found)
    return measure_parallel(case, CPU, repeats=3)


def test_a_row_has_the_rates_of_all_and_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = GateResult("sum", True, "fine")
    together, alone = Steps([0.5, 0.25, 1.0], 3.0, 1, "sqrt"), Steps([0.25, 0.2, 0.5], 4.0, 1, "sqrt")
    row, said = measured(monkeypatch, RankMeasurement(verdict, together, alone))
    assert said is verdict
    assert (row["value"], row["spread"]) == (2 * 64 / 0.5, [128.0, 512.0])
    assert (row["one_gpu"], row["one_gpu_spread"]) == (64 / 0.25, [128.0, 320.0])
    assert (row["ratio"], row["recompute"], row["peak_gib"], row["one_gpu_peak_gib"]) == (1.0, "sqrt", 3.0, 4.0)
    assert Case.of_row(row) == TWO
    too_large, _ = measured(monkeypatch, RankMeasurement(verdict, together))
    assert too_large["one_gpu"] is too_large["ratio"] is None
    assert merged([row], [too_large]) == [too_large]
    assert len(merged([row], [row | {"gpus": 4}, row | {"update": "replicated"}])) == 3
    pooled, _ = measured(monkeypatch, RankMeasurement(verdict, together, alone), dataclasses.replace(TWO, state=2))
    assert (pooled["value"], pooled["ratio"], pooled["state_parallel"]) == (64 / 0.5, 0.5, 2)
    assert len(merged([row], [pooled])) == 2
    page = markdown(Outcome(Machine("m", "p", 1e12, 1e10), [row, too_large]), command="c", hardware=None)
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| toy |")]
    assert lines[0][7:13] == ["256", "128–512", "3", "256", "128–320", "1.00"]
    assert lines[1][10:13] == ["", "", ""]
    assert share_of_peak(row, Machine("m", "p", 1e12, 1e10)) == pytest.approx(work_per_token(row) * 128 / 1e12)


def test_what_is_red_or_too_large_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = GateResult("sum", False, "far off")
    with pytest.raises(GateFailed, match="sum, far off"):
        measured(monkeypatch, RankMeasurement(verdict, red="sum, far off"))
    with pytest.raises(torch.OutOfMemoryError):
        measured(monkeypatch, RankMeasurement(verdict))
    monkeypatch.setattr("longread.bench.run.measure_machine", lambda device: Machine("one", "product", 1e11, 1e10))
    monkeypatch.setattr("longread.bench.run.check_gradients", lambda *_: GateResult("one", True, "fine"))
    outcome = run_cases([TWO], CPU, repeats=1)
    assert outcome.failures == [(TWO, "does not fit into memory")]


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--gpus is 2, and there are 1 GPUs; lower it"):
        measure_parallel(TWO, torch.device("cuda"), repeats=1)
    with pytest.raises(UserError, match="prefill is measured on one GPU; leave --gpus out, or choose train"):
        Case("prefill", "e2e", "toy", 64, gpus=2)
    with pytest.raises(UserError, match="--gpus 99 is more than the 16 of a machine"):
        Case("train", "e2e", "toy", 64, gpus=99)
    with pytest.raises(UserError, match="--state-parallel 3 does not divide --gpus 4; choose a divisor"):
        Case("train", "e2e", "toy", 64, gpus=4, state=3)
    with pytest.raises(UserError, match="--state-parallel divides fast MLPs, and swa has none; choose e2e"):
        Case("train", "swa", "toy", 64, gpus=2, state=2)
    with pytest.raises(UserError, match="--update fully-sharded cannot be measured yet"):
        Case("train", "e2e", "toy", 64, gpus=2, update="fully-sharded")
    assert {case.work for case in plan(gpu=True, gpus=2)} == {"train"}
    assert str(TWO) == "train toy e2e 64 on 2 GPUs, shared"


def test_the_estimate_beside_a_peak_is_that_of_the_command() -> None:
    """3B at 8K on two GPUs: half of the moments and of the sums of gradients, a bucket, activations of one sequence."""
    case = Case("train", "e2e", "3b", 8192, gpus=2)
    found = parallel._estimated_gib(case, torch.device("cuda"), Steps([1.0], 1.0, 1, "none"))
    N = case.config.model.num_parameters
    largest = 4 * 128_256 * 2560
    assert found == pytest.approx((4 * N + 6 * N + 4 * N + 1.5 * largest) / 2**30 + 1 + 44.87, abs=0.1)
