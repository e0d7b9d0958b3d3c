"""The run where it must not go on: numbers that are not finite, what does not go together, disks that fail."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from longread import checkpoint, files, train as training
from longread.config import RunConfig, TrainingHalted, UserError
from longread.data import TokenDataset, prepare
from longread.model import Transformer
from longread.recipes import recipe
from longread.tokenizer import ByteTokenizer
from longread.train import train
from tests.test_train import CONFIG, change, make_data, rows_of, weights_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at its end, which no test changes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(CONFIG, data, run)
    return run


# Numbers that are not finite


def test_a_diverging_run_halts_with_a_diagnosis_and_saves_nothing_of_it(tmp_path: Path, data: TokenDataset) -> None:
    config = change(
        steps=40, optimizer__lr=1e12, optimizer__initial_lr=1e-3, optimizer__warmup_steps=5, checkpoint_every=1
    )
    config = change(config, optimizer__decay_steps=40, optimizer__clip=None)
    with pytest.raises(TrainingHalted, match=r"halted at step \d+: .*lower optimizer.lr \(it is 1e\+12\)") as halted:
        train(config, data, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert str(newest) in str(halted.value)
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_checkpoint(newest).model.values())
    assert not (tmp_path / "run" / "model").exists()
    assert halted.value.exit_status == 3


def poison(monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[Transformer, Any], Any]) -> None:
    """Lets `spoil` change what the gradient of `step`, counted from 1, found."""
    real, calls = training.accumulate_gradient, iter(range(1, 1000))

    def poisoned(model: Transformer, *args: Any, **options: Any) -> Any:
        found = real(model, *args, **options)
        return spoil(model, found) if next(calls) == step else found

    monkeypatch.setattr("longread.train.outer_step.accumulate_gradient", poisoned)


def bad_gradient(model: Transformer, found: Any) -> Any:
    model.blocks[1].fast_mlp.up.weight.grad[0, 0] = math.inf
    return found


def huge_gradient(model: Transformer, found: Any) -> Any:
    model.final_norm.weight.grad.fill_(1e30)
    return found


@pytest.mark.parametrize(
    ("spoil", "diagnosis"),
    [
        (lambda model, found: found._replace(loss=torch.tensor(math.nan)), "the loss is nan"),
        (bad_gradient, r"the gradient of blocks\.1\.fast_mlp\.up\.weight is not finite \(the loss is 5\."),
        (huge_gradient, "the gradients are too large for their norm"),
        (lambda model, found: found._replace(inner_grad_norm=torch.tensor([[math.inf]])), "an inner gradient"),
    ],
)
def test_the_diagnosis_names_what_went_wrong(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch, spoil: Any, diagnosis: str
) -> None:
    poison(monkeypatch, 4, spoil)
    with pytest.raises(TrainingHalted, match=rf"halted at step 4: .*{diagnosis}.*step-00000002"):
        train(CONFIG, data, tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 3


def test_the_batch_of_a_single_sequence_is_kept_too(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, bad_gradient)
    with pytest.raises(TrainingHalted, match="halted at step 1"):
        train(change(batch_size=1, micro_batch_size=1), data, tmp_path / "run")
    (kept,) = (tmp_path / "run" / "quarantine").iterdir()
    tensors, _ = files.read_tensors(kept, kind="batch")
    assert torch.equal(tensors["input_ids"][:, 1:], tensors["target_ids"][:, :-1])


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: Transformer, found: Any) -> Any:
        with torch.no_grad():
            model.final_norm.weight[2] = math.nan
        return found

    poison(monkeypatch, 2, spoil)
    with pytest.raises(
        TrainingHalted, match=r"final_norm\.weight is not finite after the update.*no earlier checkpoint"
    ):
        train(CONFIG, data, tmp_path / "run")
    assert checkpoint.newest_checkpoint(tmp_path / "run") is None


# What it refuses


def test_a_directory_that_holds_a_run_is_refused_without_resume(finished: Path, data: TokenDataset) -> None:
    before = weights_of(finished)
    with pytest.raises(UserError, match="already holds a run; resume it"):
        train(change(seed=1), data, finished)
    assert weights_of(finished) == before


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"optimizer__lr": 0.02}, r"optimizer\.lr was 0\.01 when this run began and is 0\.02 now"),
        ({"model__window_size": 4}, r"model\.window_size was 8 .* is 4 now"),
        ({"seed": 3}, "seed was 0 .* is 3 now"),
        ({"steps": 5}, "steps was 6 .* is 5 now"),
        ({"inner__surprise": 1.0}, r"inner\.surprise was 0\.0 .* is 1\.0 now"),
    ],
)
def test_another_config_is_refused_on_resume_by_the_name_of_the_field(
    finished: Path, data: TokenDataset, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        train(change(**fields), data, finished, resume=True)


def test_other_data_are_refused_on_resume(tmp_path: Path, finished: Path, data: TokenDataset) -> None:
    with pytest.raises(UserError, match=r"of the data was .* when this run began"):
        train(CONFIG, make_data(tmp_path, seed=2, validation_fraction=0), finished, resume=True)
    same = TokenDataset.open(data.directory)
    same.tokenizer_fingerprint = "another"
    with pytest.raises(UserError, match="the tokenizer of the data was"):
        train(CONFIG, same, finished, resume=True)
    with pytest.raises(UserError, match="validation data has another tokenizer"):
        train(CONFIG, data, tmp_path / "other", validation=same)


@pytest.mark.parametrize("checkpoint_every", [1, None])
def test_other_initial_weights_are_refused_on_resume(
    tmp_path: Path, data: TokenDataset, checkpoint_every: int | None
) -> None:
    def die(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    config = change(checkpoint_every=checkpoint_every)
    a, b, extended, new = (tmp_path / name for name in ("a", "b", "extended", "new"))
    for seed, path in enumerate((a, b)):
        train(change(steps=1, seed=seed), data, path)
    for path, initial in ((extended, a), (new, None)):
        with pytest.raises(KeyboardInterrupt):
            train(config, data, path, initial=initial, on_step=die)
    before = (extended / "metrics.jsonl").read_bytes()
    remedy = r"resume without it, or train into another directory"
    began = rf"^{extended} began with the weights of {a} \(\w{{8}}\), and {b} holds others \(\w{{8}}\); {remedy}$"
    with pytest.raises(UserError, match=began):
        train(config, data, extended, initial=b, resume=True)
    with pytest.raises(UserError, match=rf"^{new} began with new weights, and {a} holds others \(\w{{8}}\); {remedy}$"):
        train(config, data, new, initial=a, resume=True)
    assert (extended / "metrics.jsonl").read_bytes() == before
    train(change(steps=2, seed=0), data, a, resume=True)
    with pytest.raises(UserError, match=rf"began with the weights of {a} .* and {a} holds others"):
        train(config, data, extended, initial=a, resume=True)
    if checkpoint_every is None:  # then there is nothing to go on from but the weights it began with
        with pytest.raises(UserError, match=rf"{a} holds others \(\w{{8}}\); train into another directory$"):
            train(config, data, extended, resume=True)


def test_what_a_run_began_with_is_not_made_up(tmp_path: Path, data: TokenDataset) -> None:
    """Runs of earlier revisions do not say it, and a run.json may be lost."""
    a, run = tmp_path / "a", tmp_path / "run"
    train(change(steps=1), data, a)
    train(change(steps=1), data, run, initial=a)
    (run / "run.json").unlink()
    for steps, initial in ((2, None), (3, a), (4, None)):
        train(change(steps=steps), data, run, initial=initial, resume=True)
        assert "initial" not in files.read_json(run / "run.json", kind="run")


def test_a_model_whose_checkpoints_are_gone_is_not_overwritten(tmp_path: Path, data: TokenDataset) -> None:
    train(CONFIG, data, tmp_path / "run")
    files.remove_tree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(change(steps=9), data, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (change(model__vocab_size=256), {}, "vocab_size 256, but the data has 257"),
        (change(context_length=4096), {}, "4096"),
        (CONFIG, {"device": "abacus"}, "device abacus cannot be used"),
        (CONFIG, {"trackers": ["abacus"]}, "no tracker 'abacus'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    tmp_path: Path, data: TokenDataset, config: RunConfig, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        train(config, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_took_a_step_leaves_its_place_free(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr("longread.train.outer_step.accumulate_gradient", fails)
        with pytest.raises(UserError, match=r"out of memory at step 1: 1 sequences of 32 tokens .* nothing was"):
            train(change(micro_batch_size=1, recompute="step"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(change(steps=1, micro_batch_size=1), data, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:out of memory")
def test_what_does_not_fit_after_all_is_cut_further(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates may be too low. The run goes on with less at a time, less by a tenth while there is, and so does one
    that resumes it."""
    tried, real = [], training.accumulate_gradient

    def hungry(model: Transformer, config: RunConfig, *args: Any, **options: Any) -> Any:
        tried.append((config.micro_batch_size, config.recompute))
        if config.recompute != "sqrt":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, config, *args, **options)

    with monkeypatch.context() as small:
        small.setattr("longread.train.outer_step.accumulate_gradient", hungry)
        small.setattr(
            "longread.train.settling.graph_bytes",
            lambda *_, **__: {"none": 40, "1-blocks": 37, "blocks": 30, "1-steps": 28, "sqrt": 26, "step": 50},
        )
        train(change(steps=2), data, tmp_path / "run")
    assert tried[:5] == [(4, "none"), (2, "none"), (1, "none"), (1, "blocks"), (1, "sqrt")]
    assert set(tried[5:]) == {(1, "sqrt")}
    state = checkpoint.read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002").state
    assert (state["recompute"], state["micro_batch_size"]) == ("sqrt", 1)
    train(change(steps=2, recompute="sqrt", micro_batch_size=1), data, tmp_path / "same")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "same")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_gpu_that_is_smaller_than_estimated_trains_with_less(tmp_path: Path) -> None:
    """Its memory is limited behind the back of whoever asks what is free: 8 sequences at a time need twice as much."""
    (tmp_path / "text.txt").write_text("".join(f"word{(i * i) % 97} " for i in range(20_000)))
    data = prepare([tmp_path / "text.txt"], tmp_path / "data", ByteTokenizer(), documents="join")
    config = recipe("small", context_length=8192, vocab_size=257, batch_size=8, steps=2)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(4 * 2**30 / total)
    try:
        result = train(config, data, tmp_path / "run", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert result.step == 2
    assert checkpoint.read_checkpoint(newest).state["micro_batch_size"] < 8


def test_memory_that_runs_out_later_costs_no_step(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what became of it in a CUDA graph; the sentence names what was too much, and how to go on."""
    config = change(checkpoint_every=None, micro_batch_size=2, recompute="none")

    def spoil(model: Transformer, found: Any) -> Any:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    with monkeypatch.context() as full:
        poison(full, 4, spoil)
        remedies = "--set micro_batch_size=1, --set recompute=sqrt, --only suffix, a shorter context or a smaller model"
        with pytest.raises(UserError, match=f"out of memory at step 4: 2 sequences .*; {remedies} .* from step 3$"):
            train(config, data, tmp_path / "run")
    train(config, data, tmp_path / "run", resume=True)
    train(config, data, tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Also for root, who may write anywhere: it becomes nobody for the while."""
    directory.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        directory.chmod(0o755)


def test_a_read_only_place_is_named(tmp_path: Path, data: TokenDataset) -> None:
    with read_only(tmp_path), pytest.raises(UserError, match=r"cannot write .*run: Permission denied"):
        train(CONFIG, data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_costs_only_the_steps_since_the_last_checkpoint(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            monkeypatch.setattr("longread.files.os.fsync", full)

    with pytest.raises(UserError, match=r"cannot write .*: No space left"):
        train(CONFIG, data, tmp_path / "run", on_step=fill)
    monkeypatch.undo()
    assert checkpoint.newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000002"
    train(CONFIG, data, tmp_path / "run", resume=True)
    train(CONFIG, data, tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
