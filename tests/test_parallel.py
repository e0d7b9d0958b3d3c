"""Ranks decide alike, and divided rows are stepped as whole parameters are."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Store, TCPStore

from longread.config import OptimizerConfig, UserError
from longread.parallel import DividedRows, Launch, RankFailed, World, joined
from longread.parallel.failure import first_sentence, is_of_peers
from longread.parallel.meeting import meeting_store
from longread.parallel.rows import row_mesh
from longread.train.optimizer import make_optimizer, update
from tests.ranks import Ranks

SIZE = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(SIZE, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def test_one_process_is_the_identity() -> None:
    world = World()
    assert world.is_first
    assert world.agree(3, 0) == (3, 0)
    assert world.total(2.5) == (2.5,)
    assert world.first({"a": [1]}) == {"a": [1]}
    assert world.each({"a": [1]}) == [{"a": [1]}]
    with pytest.raises(ValueError, match="mine"), world.together("a place"):
        raise ValueError("mine")


def test_a_place_is_that_of_torchrun() -> None:
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Launch.from_environment(told) == Launch(5, 8, 1, 4, 0)
    assert Launch.from_environment(told | {"TORCHELASTIC_RESTART_COUNT": "2"}).restarts == 2
    assert Launch.from_environment({}) == Launch()
    assert Launch.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()


@pytest.mark.parametrize("damage", [{"RANK": "8"}, {"RANK": "x"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}])
def test_a_place_that_is_none_is_refused(damage: dict[str, str]) -> None:
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UserError, match="torchrun"):
        Launch.from_environment(told | damage)


def decisions() -> tuple[Any, ...]:
    world = World(Launch.from_environment())
    found = world.agree(world.rank == 2, -world.rank), world.total(0.5, world.rank), world.first({"rank": world.rank})
    assert world.each({"ü": world.rank}) == [{"ü": rank} for rank in range(SIZE)]
    try:
        with world.together("opening the data"):
            if world.rank in (1, 3):
                raise UserError(f"no data for {world.rank} — ünï")
        said = "nothing"
    except UserError as error:
        said = f"{type(error).__name__}: {error}"
    with world.together("a place where all is well"):
        pass
    return *found, said


def test_all_decide_alike(ranks: Ranks) -> None:
    found = ranks.run(decisions)
    assert [each[:3] for each in found] == [((1, 0), (2, 6), {"rank": 0})] * SIZE
    other = "RankFailed: rank 1 failed at opening the data: no data for 1 — ünï"
    assert [each[3] for each in found] == [
        other,
        "UserError: no data for 1 — ünï",
        other,
        "UserError: no data for 3 — ünï",
    ]


def known() -> tuple[str, bool]:
    """An error that is agreed on already, inside of another block."""
    world = World(Launch.from_environment(), deadline=10)

    def fail() -> None:
        with world.together("outside"), world.together("inside"):
            if world.rank == 2:
                raise ValueError("mine")

    with pytest.raises((ValueError, RankFailed)) as caught:
        fail()
    return str(caught.value), world.agree(1) == (1,)


def test_nobody_is_asked_twice_about_an_error(ranks: Ranks) -> None:
    other = ("rank 2 failed at inside: mine", True)
    assert ranks.run(known) == [other, other, ("mine", True), other]


def late() -> str:
    world = World(Launch.from_environment(), deadline=1.0)
    world.step = 7
    if world.rank == 2:
        world.step = 6
        world.say("reading a slow disk")
        with pytest.raises(RankFailed):
            World.agree(_sleeping(world), 0)
        return ""
    with pytest.raises(RankFailed) as caught:
        world.agree(0, at="the norm")
    return str(caught.value)


def _sleeping(world: World) -> World:
    time.sleep(3)
    return world


def test_who_is_late_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Ranks(3, tmp_path_factory.mktemp("late")) as few:
        found = few.run(late)
    for rank in (0, 1):
        assert found[rank].startswith(
            f"rank {rank} waited at step 7, the norm, for rank 2 (step 6, reading a slow disk)"
        )
        assert "--resume" in found[rank]


def sum_without_the_other() -> str:
    world = World(Launch.from_environment(), deadline=1.0)
    world.step = 3
    mesh = row_mesh(2, 2, "cpu", world.deadline)
    rows = DividedRows(dict(Net().named_parameters()), mesh)
    gradients(net := Net(), world.rank, 0)
    for name, parameter in net.named_parameters():
        rows.parameters[name].grad = parameter.grad
    if world.rank == 1:
        world.say("a long sleep")
        time.sleep(3)
        return ""
    with pytest.raises(RankFailed) as caught, world.waiting("the sum"):
        rows.reduce(1.0)
    return str(caught.value)


def test_a_sum_does_not_wait_beyond_the_deadline(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Ranks(2, tmp_path_factory.mktemp("sum")) as few:
        found, _ = few.run(sum_without_the_other)
    assert found.startswith("rank 0 waited at step 3, the sum, for rank 1 (step 3, a long sleep)")


def of_unequal_machines() -> str:
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2" if rank < 2 else "1")
        patch.setenv("LOCAL_RANK", str(rank % 2))
        with pytest.raises(UserError) as caught, joined("cpu", deadline=20.0):
            pass
    return str(caught.value)


def test_machines_must_have_as_many_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Ranks(3, tmp_path_factory.mktemp("unequal")) as few:
        found = few.run(of_unequal_machines)
    assert found == ["machines have 1 to 2 of 3 processes; start as many on each"] * 3


class Net(nn.Module):
    """Parameters of all kinds of shapes: fewer rows than ranks, rows that do not divide, one that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"a": (8, 3), "b": (2, 5), "c": (7,), "d": (1,), "e": (9, 2, 2), "unused": (4, 4)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))


def gradients(net: Net, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    for name, parameter in net.named_parameters():
        if name != "unused":
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


OPTIMIZER = OptimizerConfig(lr=0.1, warmup_steps=0, decay_steps=10, clip=1.0, weight_decay=0.1)


def trained_together(divided: int, bucket_bytes: int) -> tuple[dict[str, torch.Tensor], list[float], bool]:
    net, mesh = Net(), row_mesh(SIZE, divided, "cpu")
    rows = DividedRows(dict(net.named_parameters()), mesh, bucket_bytes=bucket_bytes, direct_bytes=bucket_bytes // 4)
    optimizer = make_optimizer(net, OPTIMIZER, rows)
    places, norms = [p.data_ptr() for p in net.parameters()], []
    for step in range(3):
        gradients(net, torch.distributed.get_rank(), step)
        rows.reduce(1 / SIZE)
        norms.append(rows.norm().item())
        update(net, optimizer, OPTIMIZER, step, rows.norm(), rows)
    stayed = places == [p.data_ptr() for p in net.parameters()]
    return {name: p.detach() for name, p in net.named_parameters()}, norms, stayed


@pytest.mark.parametrize("divided", [1, 2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 300, 2**20])
def test_divided_rows_are_stepped_as_whole_parameters(ranks: Ranks, divided: int, bucket_bytes: int) -> None:
    alone, norms = Net(), []
    rows = DividedRows(dict(alone.named_parameters()))
    optimizer = make_optimizer(alone, OPTIMIZER, rows)
    for step in range(3):
        nets = [Net() for _ in range(SIZE)]
        for rank, net in enumerate(nets):
            gradients(net, rank, step)
        for name, parameter in alone.named_parameters():
            if name != "unused":
                parameter.grad = sum(net.get_parameter(name).grad for net in nets) / SIZE  # type: ignore[misc]
        norms.append(rows.norm().item())
        update(alone, optimizer, OPTIMIZER, step, rows.norm(), rows)
    for found, found_norms, stayed in ranks.run(trained_together, divided, bucket_bytes):
        assert stayed
        assert found_norms == pytest.approx(norms, rel=1e-13)
        for name, parameter in alone.named_parameters():
            assert torch.allclose(found[name], parameter.detach(), rtol=1e-12, atol=1e-14), name


def moments_held() -> list[int]:
    net = Net()
    rows = DividedRows(dict(net.named_parameters()), row_mesh(SIZE, SIZE, "cpu"))
    optimizer = make_optimizer(net, OPTIMIZER, rows)
    gradients(net, 0, 0)
    rows.reduce(1.0)
    update(net, optimizer, OPTIMIZER, 0, rows.norm(), rows)
    return [state["exp_avg"].numel() for state in optimizer.state.values()]


def test_each_rank_holds_moments_of_its_rows_alone(ranks: Ranks) -> None:
    whole = sum(p.numel() for name, p in Net().named_parameters() if name != "unused")
    held = [sum(each) for each in ranks.run(moments_held)]
    assert sum(held) == whole
    assert max(held) < whole / 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A store such as torchrun keeps over its restarts."""
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return kept


def met(size: int = 3) -> list[Store]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: meeting_store(rank, size, 20.0), range(size)))


def test_each_start_has_a_store_of_its_own(server: TCPStore) -> None:
    first = met()
    first[2].set("address", "of a process that is dead")
    assert first[0].get("address") == first[1].get("address") == b"of a process that is dead"
    second = met()
    assert not any(store.check(["address"]) for store in second)
    second[0].set("address", "alive")
    assert second[1].get("address") == second[2].get("address") == b"alive"
    assert first[1].get("address") == b"of a process that is dead"


def test_ranks_that_do_not_come_are_named(server: TCPStore) -> None:
    met()  # their questions stay
    with pytest.raises(RankFailed, match=r"^rank 0 waited 0\.3 seconds for ranks 1, 2 to begin; start all "):
        meeting_store(0, 3, 0.3)
    with pytest.raises(RankFailed, match=r"^rank 2 waited 0\.3 seconds for rank 0 to begin: "):
        meeting_store(2, 3, 0.3)


def gone() -> str:
    """What a rank says where PyTorch finds that another is gone, outside of all that `World` does itself."""
    world = World(Launch.from_environment(), deadline=2)
    if world.rank:
        return ""
    try:
        with world.naming_the_late():
            world.say("a place")
            dist.all_reduce(torch.zeros(1), group=world.votes)
    except RankFailed as error:
        return str(error)
    return "nothing"


def test_a_peer_that_is_late_anywhere_is_named(ranks: Ranks) -> None:
    said = ranks.run(gone)[0]
    assert re.match(r"rank 0 waited at step 0, a place, for rank 1 \(", said)
    assert said.endswith("; the checkpoints are whole, start again with --resume")


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error), match=str(error)), World().naming_the_late():
            raise error
    assert not is_of_peers(RuntimeError("shapes differ"))
    assert is_of_peers(dist.DistStoreError("wait timeout"))
    assert is_of_peers(RuntimeError("[third_party/gloo/pair.cc:553] Connection closed by peer [1.2.3.4]:5. Typically"))


def test_of_what_pytorch_says_the_first_sentence_is_said() -> None:
    reason = "[/a/b.cc:5] Connection closed by peer [1.2.3.4]:5. This is typically caused by a crash.\nMore"
    assert first_sentence(reason) == "Connection closed by peer [1.2.3.4]:5"
    assert first_sentence("wait timeout after 5000ms, keys: /a/0") == "wait timeout after 5000ms"
