"""States and files on their way: nothing is copied whole where a piece is enough."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.engine import Engine
from longread.engine.copies import Staging, beside, carried
from longread.session import Session
from tests.test_engine_batches import INNER, after, assert_same, make, text

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"vocab_size": 257, "width": 256, "mlp_hidden": 1024, "num_heads": 4}


@pytest.mark.parametrize("inward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.long, torch.bool])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_passes_in_pieces_arrives_whole(device: str, dtype: torch.dtype, inward: bool) -> None:
    place = torch.device(device)
    staging = Staging(place, nbytes=64)
    for count in (0, 1, 8, 9, 64, 129, 1000):
        there = torch.randint(0, 2, (1, count), device=place).to(dtype)
        here = torch.randint(0, 2, (1, count)).to(dtype)
        source, target = (there, here) if inward else (here, there)
        expected = source.cpu().clone()
        staging.copy(source, target)
        assert torch.equal(target.cpu(), expected)
        assert torch.equal(source.cpu(), expected)


def test_what_is_there_already_is_not_copied() -> None:
    state = after(make(), 9, 0)
    assert carried(state, CPU) is state


@pytest.mark.gpu
def test_a_state_goes_to_the_host_and_comes_back() -> None:
    model = make().cuda()
    state = after(model, 9, 0)
    with beside(model.device):
        held = carried(state, CPU)
    assert all(x.device == CPU and not x.is_pinned() for x in held.tensors)
    with beside(model.device):
        back = carried(held, model.device)
    assert_same(back, state)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that Python holds at once while it works; tensors are PyTorch's."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_files_of_sessions_are_never_whole_in_memory(tmp_path: Path) -> None:
    with Engine(make(torch.float32, **WIDE), INNER, directory=tmp_path) as engine:
        sid = engine.create().id
        engine.append(sid, text(9)).result()
        path = engine.export(sid)
        size = path.stat().st_size
        assert size > 4 * 2**20
        engine.append(sid, text(9, 1)).result()
        assert peak(lambda: engine.export(sid)) < size / 8
        assert peak(lambda: engine.restore(path)) < size / 8
        assert Session.restore(engine.export(sid), engine.model).position == 18
