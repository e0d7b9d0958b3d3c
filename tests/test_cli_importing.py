"""How a command imports PyTorch: without looking for garbage, while the GPU is opened."""

from __future__ import annotations

import ctypes
import gc
import os
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
    ("device", "ranks", "built", "opened"),
    [
        ("auto", "1", "'13.0'", "0"),
        ("cuda", "1", "'12.8'", "0"),
        ("cuda:1", "1", "'12.8'", "1"),
        ("cpu", "1", "'12.8'", None),
        ("auto", "2", "'12.8'", None),
        ("auto", "1", "None", None),  # for CPUs or other GPUs
    ],
)
def test_a_gpu_is_opened_while_torch_is_imported(
    device: str, ranks: str, built: str, opened: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[tuple[str, str, bool]] = []

    def note(index: str) -> None:
        found.append((index, os.environ["CUDA_MODULE_LOADING"], threading.current_thread().daemon))

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\ncuda: Optional[str] = {built}\nhip = '7'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")
    monkeypatch.delenv("CUDA_MODULE_LOADING")
    monkeypatch.setattr(cli, "_open_gpu", note)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    cli.import_torch(device)
    for thread in threading.enumerate():
        if thread.name == "open GPU":
            thread.join()
    assert found == ([(opened, "LAZY", False)] if opened else [])


def test_a_command_that_ends_while_cublas_begins_is_not_aborted() -> None:
    """As where its model turns out to be damaged: PyTorch aborts a process that ends amid an operation of a daemon."""
    code = """
import threading, sys, torch
from longread import UserError, loading
def multiply(place):
    begun.set()
    for _ in range(50):
        torch.ones(400, 400) @ torch.ones(400, 400)
def load(*_, **__):
    begun.wait()
    raise UserError("damaged")
begun = threading.Event()
loading.find_device = lambda name: torch.device("cuda")
loading.find_model = lambda name: name
loading._multiply, loading.load_model = multiply, load
try:
    loading.open_model("x")
except UserError:
    sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 2


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
