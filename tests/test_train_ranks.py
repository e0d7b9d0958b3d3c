"""A run of several ranks is the run of one: its losses, its weights, its checkpoints, its ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from longread import checkpoint
from longread.config import Parallelism, RunConfig, UserError
from longread.data import Sampler, TokenDataset, prepare
from longread.files import read_tensors
from longread.parallel import Launch
from longread.tokenizer import ByteTokenizer
from longread.train import TrainingProgress, outer_step, train
from longread.train.sharing import Share
from tests.ranks import Ranks
from tests.test_train import CONFIG, change, make_data, rows_of, without_timing

BASE = change(precision="float64", steps=4, evaluate_every=4, checkpoint_every=None)
SHORT = change(BASE, steps=2, evaluate_every=2)
VARIANTS: dict[str, tuple[RunConfig, Parallelism]] = {
    "shared": (SHORT, Parallelism()),
    "replicated": (SHORT, Parallelism(update="replicated")),
    "one sequence at a time": (change(SHORT, micro_batch_size=1), Parallelism()),
    "computed again": (change(SHORT, recompute="1-steps"), Parallelism()),
    "step by step": (change(SHORT, recompute="step"), Parallelism()),
    "first-order": (change(SHORT, meta_gradient="first-order"), Parallelism()),
    "truncated": (change(SHORT, truncate_after=2), Parallelism()),
    "static": (change(SHORT, loss="static"), Parallelism()),
    "unclipped": (change(SHORT, optimizer__clip=None, inner__clip=None), Parallelism()),
    "clipped": (change(SHORT, optimizer__clip=0.01), Parallelism()),
    "fully sharded": (SHORT, Parallelism(update="fully-sharded")),
    "fully sharded, one sequence at a time": (
        change(SHORT, micro_batch_size=1, recompute="sqrt"),
        Parallelism(update="fully-sharded"),
    ),
    "fast MLPs divided": (SHORT, Parallelism(state=2)),
    "fast MLPs divided, step by step": (change(SHORT, recompute="step", micro_batch_size=2), Parallelism(state=2)),
    "the suffix alone": (change(SHORT, trained_blocks=1), Parallelism()),
}
ESSENTIAL = [
    "replicated",
    "first-order",
    "static",
    "clipped",
    "fully sharded, one sequence at a time",
    "fast MLPs divided, step by step",
    "the suffix alone",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


def run(
    config: RunConfig, data: Path, out: Path, parallelism: Parallelism | None = None, resume: bool = False
) -> dict[str, Any]:
    """On every rank, or alone: how the run ended."""
    dataset = TokenDataset.open(data)
    validation = dataset.validation if config.evaluate_every else None
    try:
        found = train(
            config,
            dataset,
            out,
            validation=validation,
            device="cpu",
            parallelism=parallelism,
            deadline=60.0,
            resume=resume,
        )
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"step": found.step, "saved": found.saved_step, "signal": found.signal, "tokens": found.tokens}


def run_many(cases: list[tuple[RunConfig, Parallelism]], data: Path, out: Path) -> list[dict[str, Any]]:
    return [run(config, data, out / str(i), parallelism) for i, (config, parallelism) in enumerate(cases)]


def assert_same(run: Path, expected: Path, tolerance: float = 1e-12) -> None:
    found, wanted = (load_file(path / "model" / "model.safetensors") for path in (run, expected))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name
    for row, other in zip(*map(without_timing, map(rows_of, (run, expected))), strict=True):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, rel=tolerance)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(ESSENTIAL, id="essential"),
        pytest.param([name for name in VARIANTS if name not in ESSENTIAL], id="others", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(ranks: Ranks, data: TokenDataset, tmp_path: Path, names: list[str]) -> None:
    cases = [VARIANTS[name] for name in names]
    found = ranks.run(run_many, cases, data.directory, tmp_path / "two")
    assert found[0] == found[1]
    for i, (name, (config, _)) in enumerate(zip(names, cases, strict=True)):
        assert run(config, data.directory, tmp_path / name) == found[0][i]
        assert_same(tmp_path / "two" / str(i), tmp_path / name)


def test_ranks_whose_sequences_are_padding_count_for_less(ranks: Ranks, tmp_path: Path) -> None:
    """Documents of one token fill no sequence with targets: a rank may have fewer of them than the other, or none."""
    (tmp_path / "texts").mkdir()
    for i, length in enumerate((0, 90, 1, 40, 1, 33, 2, 7)):
        (tmp_path / "texts" / f"{i}.txt").write_text("abcdefghij"[i] * length or "x")
    made = prepare([tmp_path / "texts"], tmp_path / "data", ByteTokenizer(), documents="reset", validation_fraction=0.2)
    config = change(BASE, batch_size=2, steps=5)
    ranks.run(run, config, made.directory, tmp_path / "two")
    run(config, made.directory, tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "turns",
    [
        ("two one", "two two", "one sharded"),
        pytest.param(("one two", "two two", "sharded one", "sharded two"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: Ranks, data: TokenDataset, tmp_path: Path, turns: tuple[str, ...]
) -> None:
    whole = change(BASE, checkpoint_every=1, evaluate_every=None)
    half = change(whole, steps=2)
    run(whole, data.directory, tmp_path / "one")
    ways = {"two": Parallelism(), "sharded": Parallelism(update="fully-sharded")}
    for names in turns:
        out, (first, second) = tmp_path / names, names.split()
        for name, config in ((first, half), (second, whole)):
            if name in ways:
                ranks.run(run, config, data.directory, out, ways[name], config is whole)
            else:
                run(config, data.directory, out, None, config is whole)
        assert_same(out, tmp_path / "one")
    ranks.run(run, whole, data.directory, tmp_path / "whole")
    assert_same(tmp_path / "two two", tmp_path / "whole", 0.0)
    newest = checkpoint.newest_checkpoint(tmp_path / "two two")
    assert newest is not None
    assert len(list(newest.glob("optimizer-*"))) == 2


def started_again(data: Path, out: Path) -> dict[str, Any]:
    """As by torchrun after a rank of another machine has failed: each machine counts its own restarts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", os.environ["RANK"])
        return run(BASE, data, out)


def test_a_restart_of_one_machine_is_one_of_all(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    ranks.run(run, change(BASE, steps=2), data.directory, tmp_path / "run")
    assert [found["step"] for found in ranks.run(started_again, data.directory, tmp_path / "run")] == [4, 4]


def interrupted(data: Path, out: Path) -> dict[str, Any]:
    """Rank 1 alone hears a signal, in the middle of a step."""
    real, count = outer_step.accumulate_gradient, 0

    def gradient(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with replaced(gradient):
        return run(change(BASE, micro_batch_size=1), data, out)


@contextlib.contextmanager
def replaced(function: Callable[..., Any]) -> Iterator[None]:
    """With another `accumulate_gradient` of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer_step, "accumulate_gradient", function)
        yield


def test_a_signal_to_one_rank_stops_all_between_micro_batches(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(interrupted, data.directory, tmp_path / "run")
    assert found[0] == found[1]
    assert (found[0]["step"], found[0]["saved"], found[0]["signal"]) == (2, 2, signal.SIGTERM)
    config = change(BASE, micro_batch_size=1)
    ranks.run(run, config, data.directory, tmp_path / "run", None, True)
    ranks.run(run, config, data.directory, tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole", 0.0)


def poisoned(data: Path, out: Path, bad_batch: Any, everywhere: bool, update: Any = "shared") -> dict[str, Any]:
    """The gradient of step 3 is not finite on rank 1, or too large on every rank."""
    real, count = outer_step.accumulate_gradient, 0

    def gradient(model: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        found = real(model, *args, **options)
        if count == 3:
            if everywhere:
                model.final_norm.weight.grad.fill_(1e300)
            elif os.environ["RANK"] == "1":
                model.final_norm.weight.grad[3] = math.nan
        return found

    with replaced(gradient):
        return run(change(BASE, bad_batch=bad_batch), data, out, Parallelism(update=update))


def test_a_batch_that_is_not_finite_on_one_rank_halts_all(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(poisoned, data.directory, tmp_path / "run", "halt", False)
    assert found[0] == found[1]
    assert "TrainingHalted: training halted at step 3: rank 1: the gradient of final_norm.weight" in found[0]["error"]
    kept = list((tmp_path / "run" / "quarantine").iterdir())
    assert [path.name for path in kept] == ["step-00000003-rank-1.safetensors"]
    assert kept[0].stat().st_mode & 0o077 == 0
    tensors, facts = read_tensors(kept[0], kind="batch")
    expected = Share(1, 2).batch(_sampler(data), 2)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected._asdict().items())
    assert (facts["step"], facts["rank"]) == (3, 1)


def _sampler(data: TokenDataset) -> Sampler:
    return Sampler(data, BASE.context_length, BASE.batch_size, BASE.seed)


def test_nobody_is_blamed_where_only_the_sum_is_known(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(poisoned, data.directory, tmp_path / "run", "halt", False, "replicated")
    assert found[0] == found[1]
    assert "step 3: all ranks together: the gradient of final_norm.weight is not finite" in found[0]["error"]
    assert len(list((tmp_path / "run" / "quarantine").iterdir())) == 2


def test_it_may_be_skipped(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(poisoned, data.directory, tmp_path / "run", "skip", False)
    assert found[0] == found[1]
    assert found[0]["step"] == 4
    rows = rows_of(tmp_path / "run")
    assert [row.get("skipped", "")[:22] for row in rows] == ["", "", "rank 1: the gradient o", ""]
    assert [row["tokens"] for row in rows][1] == rows[2]["tokens"]
    assert "loss" not in rows[2]
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").values()
    )
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert "step 3 is skipped: rank 1: the gradient of final_norm.weight" in log
    assert "step 4: " in log


def always_poisoned(data: Path, out: Path) -> dict[str, Any]:
    """No step is finite from the third on; a bar and a tracker see the rows."""

    def gradient(model: Any, *args: Any, real: Any = outer_step.accumulate_gradient, **options: Any) -> Any:
        found = real(model, *args, **options)
        calls.append(0)
        if len(calls) > 2:
            model.final_norm.weight.grad[0] = math.nan
        return found

    calls: list[int] = []
    config = change(BASE, bad_batch="skip", steps=20, max_bad_steps=4)
    with replaced(gradient), TrainingProgress(config, Console(file=io.StringIO())) as progress:
        try:
            train(config, TokenDataset.open(data), out, device="cpu", deadline=60.0, on_step=progress)
        except UserError as error:
            return {"error": str(error)}
    return {}


def test_a_run_that_skips_and_skips_halts(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(always_poisoned, data.directory, tmp_path / "run")
    assert found[0] == found[1]
    assert found[0]["error"].startswith("training halted at step 6: it diverges since step 3: rank 0: the gradient of")
    assert [row.get("bad_steps") for row in rows_of(tmp_path / "run")] == [None, None, 1, 2, 3, 4]


def test_gradients_that_are_too_large_together(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(poisoned, data.directory, tmp_path / "run", "halt", True)
    assert found[0] == found[1]
    assert "too large for their norm" in found[0]["error"]
    assert list((tmp_path / "run" / "quarantine").iterdir())


def hungry(data: Path, out: Path) -> list[Any]:
    """Rank 1 alone has too little memory for two sequences."""
    real, tried = outer_step.accumulate_gradient, []

    def gradient(model: Any, config: RunConfig, *args: Any, **options: Any) -> Any:
        tried.append(config.micro_batch_size)
        if os.environ["RANK"] == "1" and config.micro_batch_size == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, config, *args, **options)

    with replaced(gradient):
        return [run(SHORT, data, out), tried]


def test_ranks_take_less_at_a_time_together(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = ranks.run(hungry, data.directory, tmp_path / "run")
    assert [tried for _, tried in found] == [[2, 1, 1]] * 2
    assert found[0][0]["step"] == 2
    run(SHORT, data.directory, tmp_path / "one")
    assert_same(tmp_path / "run", tmp_path / "one")


def lost(data: Path, out: Path) -> dict[str, Any]:
    if os.environ["RANK"] == "1":
        return run(dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, vocab_size=2)), data, out)
    return run(BASE, data, out)


def test_what_one_rank_refuses_all_refuse(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = [each["error"] for each in ranks.run(lost, data.directory, tmp_path / "run")]
    assert found[1].startswith("UserError: the model has vocab_size 2")
    assert found[0].startswith("RankFailed: rank 1 failed at the beginning of the run: the model has vocab_size 2")
    assert not (tmp_path / "run").exists()


def given_otherwise(data: Path, out: Path) -> dict[str, Any]:
    return run(change(BASE, seed=int(os.environ["RANK"])), data, out)


def test_ranks_that_are_given_other_things_do_not_begin(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    found = [each["error"] for each in ranks.run(given_otherwise, data.directory, tmp_path / "run")]
    assert found[1] == "UserError: rank 1 has another config than rank 0; start all alike"
    assert found[0].startswith("RankFailed: rank 1 failed at comparing what the ranks were given: rank 1 has another")
    assert not (tmp_path / "run").exists()


def failing(data: Path, out: Path, where: str) -> dict[str, Any]:
    """One rank fails where the other has nothing to do with it, or before they validate together."""
    rank = os.environ["RANK"]

    def fails(*_: Any, **__: Any) -> Any:
        raise UserError(f"{where} of rank {rank}")

    with pytest.MonkeyPatch.context() as patch:
        if where == "the metrics" and rank == "0":
            patch.setattr("longread.record.MetricsLog.append", fails)
        if where == "the validation" and rank == "1":
            patch.setattr("longread.train.validation._mean_loss", fails)
        return run(BASE, data, out)


@pytest.mark.parametrize(("where", "rank"), [("the metrics", 0), ("the validation", 1)])
def test_what_fails_on_one_rank_ends_all(
    ranks: Ranks, data: TokenDataset, tmp_path: Path, where: str, rank: int
) -> None:
    found = [each["error"] for each in ranks.run(failing, data.directory, tmp_path / "run", where)]
    assert found[rank] == f"UserError: {where} of rank {rank}"
    assert found[1 - rank].startswith(f"RankFailed: rank {rank} failed at ")
    assert found[1 - rank].endswith(f"{where} of rank {rank}")


@pytest.mark.parametrize(
    ("launch", "parallelism", "reason"),
    [
        (Launch(0, 3, 0, 3), Parallelism(), "batch_size 4 does not divide among 3 ranks"),
        (Launch(0, 4, 0, 4), Parallelism(state=3), "state 3 does not divide the 4 ranks"),
    ],
)
def test_a_batch_that_does_not_divide(launch: Launch, parallelism: Parallelism, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Share.of(launch, parallelism, CONFIG)


def test_shares(data: TokenDataset) -> None:
    found = [Share.of(Launch(rank, 4, rank, 4), Parallelism(state=2), BASE) for rank in range(4)]
    assert [(share.index, share.count) for share in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert found[0].of_config(change(BASE, micro_batch_size=4)).micro_batch_size == 2
    whole = _sampler(data).batch(1)
    assert torch.equal(
        torch.cat([found[0].batch(_sampler(data), 1)[0], found[2].batch(_sampler(data), 1)[0]]), whole[0]
    )


def test_run_json_says_how_many_there_were(ranks: Ranks, data: TokenDataset, tmp_path: Path) -> None:
    ranks.run(run, change(BASE, steps=1), data.directory, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (found["ranks"], found["parallelism"]) == (2, {"update": "shared", "state": 1})
