"""How a command imports PyTorch: without looking for garbage, while the GPU is opened."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from longread import cli


def test_python_looks_for_no_garbage_while_it_imports_torch() -> None:
    """Nor later in what was imported; a process that has imported it is left alone."""
    code = """
import gc, sys, longread.cli as c
def look(phase, facts):
    during.append("torch" in sys.modules and getattr(sys.modules["torch"].__spec__, "_initializing", False))
during = []
gc.callbacks.append(look)
frozen = [c.main(["generate", "--model", "nowhere"]) and gc.get_freeze_count() for _ in range(2)]
sys.exit(any(during) or not gc.isenabled() or not frozen[0] == frozen[1] > 100_000)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("device", "ranks", "opened"),
    [("auto", "1", "0"), ("cuda", "1", "0"), ("cuda:1", "1", "1"), ("cpu", "1", None), ("auto", "2", None)],
)
def test_a_gpu_is_opened_while_torch_is_imported(
    device: str, ranks: str, opened: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    indices: list[str] = []
    (tmp_path / "torch.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(cli, "_open_gpu", indices.append)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    cli.import_torch(device)
    for thread in threading.enumerate():
        if thread.name == "open GPU":
            thread.join()
    assert indices == ([opened] if opened else [])


def test_the_context_of_the_gpu_is_the_one_that_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Driver:
        def __init__(self, name: str) -> None:
            calls.append(name)

        def __getattr__(self, name: str) -> Any:
            return lambda *given: calls.append(name) or int(given[-1] == 7)

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    cli._open_gpu("1")
    assert calls == ["libcuda.so.1", "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    cli._open_gpu("7")
    assert calls[4:] == ["libcuda.so.1", "cuInit", "cuDeviceGet"]
    monkeypatch.undo()
    cli._open_gpu("x")  # a machine without a driver, or a name that is none
