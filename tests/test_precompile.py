"""Kernels compiled ahead are those that are launched later, and what goes wrong with them changes nothing."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longread.config import OptimizerConfig, RunConfig
from longread.ops import compiling, precompile
from longread.train.rehearsal import rehearse_step
from tests import precompiled, tiny

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")


def told(call: str, cache: Path) -> dict[str, Any]:
    """What a call of a function in `tests.precompiled` prints, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", f"from tests import precompiled; precompiled.{call}"],
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
        pytest.param("reading", 27, marks=pytest.mark.slow),
        pytest.param("step", 20, marks=pytest.mark.slow),
    ],
)
def test_what_is_launched_was_compiled_ahead(work: str, count: int, tmp_path: Path) -> None:
    """On memory that is really there, in another order, in another process."""
    found = told(f"launches({work!r}, ahead=True)", tmp_path / "new" / "cache")
    assert found["compiled"] == []
    assert len(found["cached"]) >= count


def test_a_later_process_does_not_hash_triton_again(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what the process beside an earlier one has kept, until Triton is another."""
    told("launches('gates', ahead=True)", tmp_path)
    (kept,) = tmp_path.glob("longread-triton-*")
    assert kept.read_text() == triton.runtime.cache.triton_key()
    monkeypatch.setattr(triton.runtime.cache, "triton_key", triton.runtime.cache.triton_key)
    kept.write_text("kept")
    monkeypatch.setattr(subprocess, "Popen", Ended)
    with pytest.raises(OSError, match="no such program"):
        precompile.begin(precompiled.gates, [16], 90)
    assert triton.runtime.cache.triton_key() == "kept"
    library = SimpleNamespace(__file__=str(tmp_path / "triton" / "__init__.py"))
    (tmp_path / "triton" / "runtime").mkdir(parents=True)
    (tmp_path / "triton" / "runtime" / "cache.py").touch()
    monkeypatch.setitem(sys.modules, "triton", library)  # type: ignore[arg-type]
    before = precompile._state_of_triton()
    (tmp_path / "triton" / "runtime" / "cache.py").write_text("x")
    assert precompile._state_of_triton() != before


@pytest.mark.parametrize("recompute", ["15-steps", "5-blocks"])
def test_a_rehearsed_step_runs_again_what_it_has(recompute: str) -> None:
    """It has fewer steps and blocks than the run."""
    model = tiny.config(num_blocks=6)
    shape = {"batch_size": 1, "context_length": 20 * model.mini_batch_size, "steps": 1}
    config = RunConfig(name="r", model=model, optimizer=OptimizerConfig(lr=1.0), recompute=recompute, **shape)
    rehearse_step(config.as_dict())


def test_neither_reading_nor_a_step_imports_pytorchs_compiler(tmp_path: Path) -> None:
    """Which takes seconds."""
    found = told("imports()", tmp_path)
    assert all(count >= 20 for count in found["counts"])
    assert not {"torch._dynamo", "torch._inductor", "sympy"}.intersection(found["modules"])


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
    monkeypatch.setattr(precompile, "FEWEST_PROCESSORS", 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
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


@pytest.fixture
def begun(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What is asked of the processes that are begun; they end at once."""
    requests: list[dict[str, Any]] = []

    class Request(io.StringIO):
        def close(self) -> None:
            requests.append(json.loads(self.getvalue()))

    def popen(command: Any, **options: Any) -> Any:
        return SimpleNamespace(stdin=Request(), returncode=0, poll=lambda: 0, wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return requests


def test_what_was_done_is_not_done_again(begun: list[dict[str, Any]]) -> None:
    """Until what is compiled, or for which device, is another."""
    for capability in (90, 90, 100):
        precompile.begin(precompiled.gates, [8], capability)
        Path(begun[-1]["done"]).touch()
    assert len(begun) == 2
    precompile.begin(precompiled.gates, [16], 90)
    assert not looked_for("a")
    assert triton.knobs.cache.manager_class is None
    assert len(begun) == 3


def test_nothing_is_begun_where_nothing_would_be_gained(
    begun: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    precompile.begin(precompiled.gates, [8], 90)
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    precompile.begin(precompiled.gates, [8], 90)
    assert begun == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(subprocess, "Popen", Ended)
    with pytest.raises(OSError, match="no such program"):
        precompile.begin(precompiled.gates, [8], 90)


@pytest.fixture
def process(gpu: None) -> Iterator[subprocess.Popen[str]]:
    """One that leaves a kernel in the cache and goes on; its standard input ends it."""
    place = Path(triton.runtime.cache.get_cache_manager("00").put("", "before")).with_name("after")
    code = f"import sys, time; time.sleep(0.2); open({str(place)!r}, 'w'); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, process_group=0) as begun:
        yield begun
        begun.kill()


def test_a_kernel_that_is_not_there_is_waited_for(process: subprocess.Popen[str]) -> None:
    precompile.let_launches_wait_for(process)
    assert looked_for("before")
    assert looked_for("after")
    assert process.poll() is None  # what else it does is not waited for
    process.communicate()
    assert not looked_for("never")
    assert triton.knobs.cache.manager_class is None


def test_nobody_waits_for_ever(process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "LONGEST", 0)
    precompile.let_launches_wait_for(process)
    assert not looked_for("never")
    assert process.poll() is None
    assert triton.knobs.cache.manager_class is None


def test_a_fork_does_not_wait_for_what_its_parent_began(process: subprocess.Popen[str]) -> None:
    precompile.let_launches_wait_for(process)
    if (child := os.fork()) == 0:
        precompile._end(process, os.getppid())
        os._exit(looked_for("never"))
    assert os.waitpid(child, 0)[1] == 0
    assert process.poll() is None
    precompile._end(process, os.getpid())
    assert process.wait() == -signal.SIGKILL


def test_a_fork_that_fails_is_told(tmp_path: Path) -> None:
    def leave(name: str) -> Any:
        return lambda: (tmp_path / name).touch()

    def fail() -> None:
        raise RuntimeError

    forks = compiling.Forks(2, 60)
    for task in [leave("a"), leave("b"), leave("c")]:
        forks.do(task)
    assert forks.all_well()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    forks.do(fail)
    forks.do(leave("d"))
    assert not forks.all_well()
    assert (tmp_path / "d").exists()
    hanging = compiling.Forks(2, 1)
    hanging.do(lambda: time.sleep(600))
    assert not hanging.all_well()


def test_a_module_that_is_spared_comes_when_it_is_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    spared = compiling._Unimported("colorsys", lambda: importlib.import_module("colorsys"), known=1)
    monkeypatch.setitem(sys.modules, "colorsys", spared)
    import colorsys

    assert colorsys is spared
    assert colorsys.known == 1  # type: ignore[attr-defined]
    assert sys.modules["colorsys"] is spared
    assert colorsys.rgb_to_yiq(0, 0, 0) == (0, 0, 0)
    assert sys.modules["colorsys"] is not spared
