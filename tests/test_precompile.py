"""Kernels compiled ahead are those that are launched later, and what goes wrong with them changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longread.ops import precompile
from tests import precompiled

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")


def launched(work: str, cache: Path, *, ahead: bool) -> dict[str, Any]:
    """What a process of its own found compiled for Hopper, and what not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.precompiled import launches; launches({work!r}, {ahead})"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("work", "count"),
    [
        ("gates", 3),
        pytest.param("reading", 20, marks=pytest.mark.slow),
        pytest.param("step", 20, marks=pytest.mark.slow),
    ],
)
def test_what_is_launched_was_compiled_ahead(work: str, count: int, tmp_path: Path) -> None:
    """On memory that is really there, in another order, in another process; a launch has waited until all was there."""
    cache = tmp_path / "new" / "cache"
    found = launched(work, cache, ahead=True)
    assert found["compiled"] == []
    assert len(found["cached"]) >= count
    assert not found["waits"]
    (done,) = cache.glob("longread-*")
    assert done.read_bytes() == b""


class Ended:
    """Stands in for `subprocess.Popen`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise OSError("there is no such program")


def looked_for(name: str) -> bool:
    """Whether Triton finds what it would write under this name."""
    return bool(triton.runtime.cache.get_cache_manager("00").get_file(name))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As if there were one, as far as `precompile` asks."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    del triton.knobs.cache.manager_class


@pytest.mark.usefixtures("gpu")
def test_nothing_happens_without_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(precompile, "begin", lambda *given: begun.append(given))
    precompile.precompile(precompiled.gates, 8, device=torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's build calls its devices cuda too
    precompile.precompile(precompiled.gates, 8, device=CUDA)
    assert begun == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    precompile.precompile(precompiled.gates, 8, device=CUDA)
    assert begun == [(precompiled.gates, [8], 90)]


@pytest.mark.usefixtures("gpu")
def test_a_process_that_cannot_be_started_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Ended)
    precompile.precompile(precompiled.gates, 8, device=CUDA)
    assert triton.knobs.cache.manager_class is None


@pytest.mark.usefixtures("gpu")
def test_what_was_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Until what is compiled, or for which device, is another."""
    begun: list[Any] = []

    def popen(command: Any, **options: Any) -> Any:
        begun.append(command)
        return SimpleNamespace(stdin=(tmp_path / "request").open("w"), kill=lambda: None, wait=lambda seconds: 0)

    monkeypatch.setattr(subprocess, "Popen", popen)
    for capability in (90, 90, 100):
        precompile.begin(precompiled.gates, [8], capability)
        Path(json.loads((tmp_path / "request").read_text())["done"]).touch()
    assert len(begun) == 2
    precompile.begin(precompiled.gates, [16], 90)
    assert not looked_for("a")
    assert triton.knobs.cache.manager_class is None
    assert len(begun) == 3


@pytest.fixture
def process(gpu: None) -> Iterator[subprocess.Popen[str]]:
    """One that leaves a kernel in the cache as it ends."""
    place = Path(triton.runtime.cache.get_cache_manager("00").put("", "before")).with_name("after")
    code = f"import time; time.sleep(0.2); open({str(place)!r}, 'w')"
    with subprocess.Popen([sys.executable, "-S", "-c", code], text=True) as begun:
        yield begun
        begun.kill()


def test_a_kernel_that_is_not_there_is_waited_for(process: subprocess.Popen[str]) -> None:
    precompile.let_launches_wait_for(process)
    assert looked_for("before")
    assert process.poll() is None
    assert looked_for("after")
    assert process.poll() == 0
    assert triton.knobs.cache.manager_class is None


def test_nobody_waits_for_ever(process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "LONGEST_WAIT", 0.0)
    precompile.let_launches_wait_for(process)
    assert not looked_for("after")
    assert process.wait() < 0


def test_a_fork_that_fails_is_told(tmp_path: Path) -> None:
    def leave(name: str) -> Any:
        return lambda: (tmp_path / name).touch()

    assert precompile.in_forks([leave("a"), leave("b"), leave("c")], 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    assert not precompile.in_forks([leave("d"), precompiled.nothing], 1)
    assert (tmp_path / "d").exists()
