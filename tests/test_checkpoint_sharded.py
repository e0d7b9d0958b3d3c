"""Checkpoints that several ranks write together, and the optimizer's moments read back at any number of ranks."""

from __future__ import annotations

import errno
import os
import pkgutil
import shutil
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from longread import checkpoint
from longread.checkpoint import CheckpointWriter, storage, training
from longread.config import UserError
from longread.files import open_tensors
from longread.parallel import DividedRows, Launch, RankFailed, World
from longread.parallel.rows import row_mesh
from tests.ranks import Ranks
from tests.test_checkpoint import INNER, equal, flip, make_model

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


def begin(saving: CheckpointWriter, step: int, rows: DividedRows) -> None:
    saving.save(
        step,
        model=make_model(step),
        inner=INNER,
        optimizer=own(rows, step),
        state={"tokens": 10 * step},
        tokenizer_fingerprint="abc",
    )


def save(run: Path, step: int, count: int) -> Path | None:
    begin(writer(run, count), step, divided(count))
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
    assert sum(x.numel() for name in pieces for x in load_file(path / name).values()) == sum(
        x.numel() for x in moments(2).values()
    )
    found = checkpoint.read_checkpoint(path)
    assert same(found.optimizer, moments(2))
    assert found.state["tokens"] == 20
    loaded = checkpoint.load_model(saved)
    assert equal(loaded.model, make_model(2))
    assert loaded.metadata["provenance"] == {"step": 2}
    for count in (1, SIZE):
        assert ranks.run(read, path, count) == [True] * SIZE


def of_divided_parameters(run: Path) -> bool:
    """Where parameters are DTensors, moments are too."""
    rows = divided(SIZE)
    given = {
        name: held if held.ndim == 0 else DTensor.from_local(held, rows.mesh, [Replicate(), Shard(0)], run_check=False)
        for name, held in own(rows, 2).items()
    }
    with CheckpointWriter(run, world(), rows) as saving:
        weights = {name: tensor.clone() for name, tensor in make_model(2).state_dict().items()}
        saving.save(2, model=make_model(), inner=INNER, optimizer=given, state={"tokens": 20}, weights=weights)
        path = saving.wait()
    return path is not None and read(path, SIZE)


def test_moments_and_weights_of_divided_parameters(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(of_divided_parameters, tmp_path) == [True] * SIZE
    assert equal(checkpoint.load_model(tmp_path).model, make_model(2))


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


def damaged(saved: Path, run: Path, name: str, damage: str) -> Path:
    """A copy of the run whose newest checkpoint has a file that is not what it was."""
    shutil.copytree(saved, run)
    file = run / "checkpoints" / "step-00000002" / name
    if damage == "flip":
        flip(file, file.stat().st_size - 9)  # in a tensor, which DCP would load
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    return file.parent


@pytest.mark.parametrize("rank", range(SIZE))
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_piece_is_passed_over_with_a_warning(saved: Path, tmp_path: Path, rank: int, damage: str) -> None:
    name = f"optimizer-0000{rank + 1}-of-00003.safetensors"
    path = damaged(saved, tmp_path / "run", name, damage)
    with pytest.raises(UserError, match=name):
        checkpoint.read_checkpoint(path)
    with pytest.warns(UserWarning, match="going back to step-00000001"):
        assert checkpoint.newest_checkpoint(tmp_path / "run") == path.with_name("step-00000001")


def newest(run: Path) -> tuple[str, str, int]:
    """What ranks find together, how they are refused, and how many of them say so."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = checkpoint.newest_checkpoint(run, world())
    with pytest.raises(UserError) as caught:
        checkpoint.read_checkpoint(run / "checkpoints" / "step-00000002", world(), divided(SIZE))
    said = sum("going back to step-00000001" in str(each.message) for each in heard)
    return str(found and found.name), str(caught.value), said


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", "flip"), ("optimizer-00002-of-00003.safetensors", "delete"), ("COMMITTED", "delete")],
)
def test_ranks_pass_over_the_same(ranks: Ranks, saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    """Each checks a part of the files; what one finds is what all find."""
    path = damaged(saved, tmp_path / "run", name, damage)
    found = ranks.run(newest, path.parent.parent)
    assert {each[:2] for each in found} == {("step-00000001", found[0][1])}
    assert [each[2] for each in found] == [int(name != "COMMITTED"), 0, 0]
    assert ("writing it was interrupted" if name == "COMMITTED" else name) in found[0][1]


def test_pieces_that_are_not_all_there_are_refused_by_themselves(saved: Path, tmp_path: Path) -> None:
    """Where nobody has looked at the manifest: a rank must never go on with numbers that were in memory by chance."""
    path = damaged(saved, tmp_path / "run", "optimizer-00002-of-00003.safetensors", "delete")
    with pytest.raises(UserError, match="is one of 3 files, of which 2 are there"):
        checkpoint.read_moments(path)
    shutil.copy(path / "optimizer-00001-of-00003.safetensors", path / "optimizer-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="lacks a part of"):
        checkpoint.read_moments(path)


def test_moments_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    other = DividedRows({"even": nn.Parameter(torch.zeros(6, 4))})
    training.write_checkpoint(tmp_path, 2, model=make_model(), inner=INNER, optimizer=moments(2), state={})
    for run in (saved, tmp_path):
        with pytest.raises(UserError, match=r"even.exp_avg.* has shape \(6, 3\), but its parameter \(6, 4\)"):
            checkpoint.read_moments(run / "checkpoints" / "step-00000002", other)


def training_goes_on(run: Path) -> tuple[bool, bool, Path | None, bool]:
    """A save that is held up while weights and moments change in place."""
    model, held, rows = make_model(5), own(divided(SIZE), 2), divided(SIZE)
    given = {name: tensor.clone() for name, tensor in held.items()}
    writing_may_go_on, real = threading.Event(), training._size_and_sum

    def slow(path: Path) -> dict[str, Any]:
        writing_may_go_on.wait(20)
        return real(path)

    training._size_and_sum = slow
    try:
        with CheckpointWriter(run, world(), rows) as saving:
            saving.save(2, model=model, inner=INNER, optimizer=given, state={"tokens": 20})
            for tensor in (*model.state_dict().values(), *given.values()):
                tensor.fill_(7)
            world().agree(1, at="a step of training")
            going_on = saving.newest is None and not (run / "checkpoints" / "step-00000002").exists()
            writing_may_go_on.set()
            path = saving.wait()
    finally:
        training._size_and_sum = real
    found = checkpoint.read_checkpoint(run / "checkpoints" / "step-00000002", world(), rows)
    return going_on, same(found.optimizer, held), path, equal(make_model(5), checkpoint.load_model(run).model)


def test_training_goes_on_while_a_checkpoint_is_written(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000002"
    assert ranks.run(training_goes_on, tmp_path) == [(True, True, path, True)] * SIZE


def refused(run: Path, function: str, rank: int) -> tuple[str, bool, str]:
    """A save during which a function has no disk left on one rank, and what the next one says."""
    saving, real = writer(run, SIZE), pkgutil.resolve_name(function)

    def full(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if world().rank == rank:
            patch.setattr(function, full)
        begin(saving, 3, divided(SIZE))
        said = ""
        try:
            begin(saving, 4, divided(SIZE))
        except UserError as error:
            said = f"{type(error).__name__}: {error}"
    world().agree(0, at="the error")
    there = sorted(path.name for path in (run / "checkpoints").iterdir())
    return said, saving.failed, " ".join(there)


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        ("longread.checkpoint.storage.write_tensors", 1),
        ("longread.checkpoint.training.make_durable", 1),
        ("longread.checkpoint.training.write_model", 0),
        ("os.replace", 0),
        ("pathlib.Path.mkdir", 0),
    ],
)
def test_a_full_disk_of_one_rank_is_an_error_of_all(
    ranks: Ranks, saved: Path, tmp_path: Path, function: str, rank: int
) -> None:
    """Raised by the save that follows. The older checkpoints are whole, temporaries are gone, and saving goes on."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    for index, (said, failed, there) in enumerate(ranks.run(refused, run, function, rank)):
        assert "No space left on device" in said
        assert said.startswith("UserError: cannot write" if index == rank else f"RankFailed: rank {rank} failed at")
        assert not failed
        assert there == "step-00000001 step-00000002"
    assert checkpoint.read_checkpoint(run / "checkpoints" / "step-00000002").step == 2
    ranks.run(save, run, 4, SIZE)
    after = checkpoint.newest_checkpoint(run)
    assert after is not None
    assert same(checkpoint.read_checkpoint(after).optimizer, moments(4))


def out_of_memory(run: Path) -> str:
    model = make_model(1)
    if world().is_first:
        model.state_dict = lambda: 1 / 0  # type: ignore[assignment]
    saving = writer(run, SIZE)
    with pytest.raises((RankFailed, ZeroDivisionError)) as caught:
        saving.save(1, model=model, inner=INNER, optimizer={}, state={})
    saving.wait()
    return type(caught.value).__name__


def test_a_copy_that_fails_on_one_rank_fails_on_all(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(out_of_memory, tmp_path) == ["ZeroDivisionError", "RankFailed", "RankFailed"]
    assert list(tmp_path.iterdir()) == []


def not_shared(run: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if world().rank == 1:
            patch.setattr(Path, "is_dir", lambda path: False)
        begin(writer(run, SIZE), 1, divided(SIZE))
        with pytest.raises(UserError) as caught:
            writer(run, SIZE).wait()
    return str(caught.value)


def test_machines_that_see_different_directories_are_told(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(not_shared, tmp_path)
    assert found[1].startswith(f"{tmp_path}/checkpoints is not what rank 0 sees there")
    assert found[0] == found[2] == f"rank 1 failed at finding the directory of rank 0: {found[1]}"


def standing_still(run: Path) -> str:
    """Rank 1 does not come to an end with its rows before the others have given up."""
    few, rows, given_up = World(Launch.from_environment(), deadline=4), divided(SIZE), threading.Event()
    saving, real = CheckpointWriter(run, few, rows), storage.write_tensors

    def still(*args: Any, **kwargs: Any) -> None:
        given_up.wait(20)
        real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if few.rank == 1:
            patch.setattr(storage, "write_tensors", still)
        begin(saving, 3, rows)
        for rank in (0, 1):  # rank 1 last
            if (few.rank == 1) == (rank == 1):
                given_up.set()
                with pytest.raises(RankFailed) as caught:
                    saving.wait()
            world().agree(0, at="the end of a test")
    return str(caught.value)


def gone(run: Path, answer: Path) -> None:
    """Rank 1 ends in the middle of writing."""
    both = World(Launch.from_environment(), deadline=20)
    rows = DividedRows(parameters(), row_mesh(2, 2, "cpu"))
    saving = CheckpointWriter(run, both, rows)
    if both.rank == 1:
        storage.write_tensors = lambda *args, **kwargs: os._exit(1)  # type: ignore[assignment]
    begin(saving, 3, rows)
    with pytest.raises(RankFailed) as caught:
        saving.wait()
    answer.write_text(str(caught.value))


@pytest.mark.parametrize("how", ["ends", "stands still"])
def test_a_rank_that_is_lost_while_it_writes_is_named_and_nothing_is_committed(
    ranks: Ranks, saved: Path, tmp_path: Path, how: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    if how == "ends":
        (tmp_path / "meeting").mkdir()
        with Ranks(2, tmp_path / "meeting") as two, pytest.raises(EOFError):
            two.run(gone, run, tmp_path / "answer")
        said = (tmp_path / "answer").read_text()
    else:
        said = ranks.run(standing_still, run)[0]
    assert said.startswith("rank 0 waited at step 3, the rows of the others, for rank 1 (step 3, writing its rows)")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoint.newest_checkpoint(run) == run / "checkpoints" / "step-00000002"


def test_what_an_error_interrupts_says_that_its_checkpoint_failed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(error: Exception | None) -> None:
        with CheckpointWriter(tmp_path) as saving:
            monkeypatch.setattr(saving, "_error", UserError("no disk"))
            assert saving.failed
            if error is not None:
                raise error

    with pytest.raises(ValueError, match="mine") as caught:
        interrupted(ValueError("mine"))
    assert "no disk" in caught.value.__notes__[0]
    with pytest.raises(UserError, match="no disk"):
        interrupted(None)


# What is kept


def steps(*numbers: int) -> list[Path]:
    return [Path(f"step-{number:08d}") for number in numbers]


@pytest.mark.parametrize(
    ("every", "stay"),
    [(None, (70, 90)), (20, (20, 45, 60, 90)), (25, (35, 55, 90)), (1000, ())],
)
def test_milestones_stay_beside_the_newest(every: int | None, stay: tuple[int, ...]) -> None:
    """The first checkpoint at or after each multiple."""
    committed = steps(5, 20, 35, 45, 55, 60, 70, 90)
    assert checkpoint.kept(committed, milestone_every=every) == {*steps(*stay), *steps(70, 90)}
    spare = committed[0]
    assert checkpoint.kept(committed, keep=1, milestone_every=every, spare=spare) >= {spare, *steps(90)}


def test_milestones_of_a_run(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, milestone_every=4) as saving:
        for step in range(2, 17, 2):
            saving.save(step, model=make_model(), inner=INNER, optimizer={}, state={})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [path.name for path in steps(4, 8, 12, 14, 16)]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_lies_beyond_does_not_count(tmp_path: Path, keep: int) -> None:
    """A run went back to step 1, as step 3 is damaged: what it saves next is not deleted for its sake."""

    def write(step: int) -> None:
        training.write_checkpoint(
            tmp_path, step, model=make_model(), inner=INNER, optimizer={}, state={}, keep=keep if step == 2 else 3
        )

    for step in (1, 3):
        write(step)
    flip(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors", 500)
    write(2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [path.name for path in steps(*(1, 2, 3)[2 - keep :])]
    with pytest.warns(UserWarning, match="going back to step-00000002"):
        assert checkpoint.newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_what_a_killed_process_should_have_deleted_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        training.write_checkpoint(tmp_path, step, model=make_model(), inner=INNER, optimizer={}, state={}, keep=9)
    paths = [tmp_path / "checkpoints" / path for path in steps(1, 2, 3, 4, 5)]
    (paths[1] / "COMMITTED").unlink()  # it was half deleted
    CheckpointWriter(tmp_path)
    assert all(path.exists() for path in paths)
    CheckpointWriter(tmp_path, newest=paths[4], spare=paths[2])
    assert [path for path in paths if path.exists()] == paths[2:]


def test_who_has_a_checkpoint_open_goes_on_reading_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        training.write_checkpoint(
            tmp_path, step, model=make_model(), inner=INNER, optimizer=moments(step), state={}, keep=1
        )
        if step == 1:
            path = checkpoint.newest_checkpoint(tmp_path)
            assert path is not None
            reading = open_tensors(path / "optimizer.safetensors", kind="optimizer")
            file, _ = reading.__enter__()
    assert not path.exists()
    assert same({name: file.get_tensor(name) for name in file.keys()}, moments(1))  # noqa: SIM118
    reading.__exit__(None, None, None)
    with pytest.raises(UserError, match="is no finished checkpoint"):
        checkpoint.read_checkpoint(path)
