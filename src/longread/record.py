"""The record of a run: its config, code, hardware and metrics; never the environment, where secrets live.

`describe_run` is what goes into run.json, `MetricsLog` is metrics.jsonl, and a `Tracker` sends the same numbers to
TensorBoard, Weights & Biases or Trackio.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from longread import __version__
from longread.config import RunConfig, UserError
from longread.extras import install_command

TIMING_FIELDS = (
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "gradient_seconds",
    "reduce_seconds",
    "update_seconds",
    "gather_seconds",
    "mfu",
    "flops",  # what is computed again depends on the memory that was free
    "recomputed_flops",
)
"""Fields of a row of metrics.jsonl that differ between two runs of one config; all others are the same."""


def describe_run(config: RunConfig, command: Sequence[str]) -> dict[str, Any]:
    """The facts of run.json: what was run, with which code, where and when."""
    return {
        "config": config.as_dict(),
        "command": list(command),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "versions": {"longread": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """The hardware that the code runs on."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def code_commit() -> str | None:
    """The commit of this code, with "+changes" if files differ from it; None outside a repository of its own."""
    here, git = Path(__file__), shutil.which("git")
    if git is None:
        return None

    def ask(*question: str) -> str | None:
        command = [git, "-C", str(here.parent), *question]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if ask("ls-files", "--error-unmatch", here.name) is None or (commit := ask("rev-parse", "HEAD")) is None:
        return None
    return commit + ("+changes" if ask("status", "--porcelain", "--untracked-files=no", ".") else "")


class MetricsLog:
    """metrics.jsonl: one JSON object a step, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one line; NaN and infinities become null. Raises `UserError`, and adds nothing, on a full disk."""
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
        size = self.size
        with self._refusals():
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError:
                if self.path.exists():
                    os.truncate(self.path, size)
                raise

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far; lines that are none are passed over."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row

    def make_durable(self) -> None:
        """Returns when every line so far would survive a power cut."""
        if self.path.exists():
            with self._refusals(), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, size: int) -> bool:
        """Drops everything after the first `size` bytes. False if there were fewer: then all whole lines stay."""
        complete = self.size >= size
        if self.path.exists():
            with self._refusals():
                os.truncate(self.path, size if complete else self.path.read_bytes().rfind(b"\n") + 1)
        return complete

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space and resume") from error


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tracker(Protocol):
    """Where metrics are sent besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step."""

    def close(self) -> None:
        """Sends what is still waiting."""


def open_tracker(name: str, *, directory: Path, run_id: str, run: Mapping[str, Any], step: int) -> Tracker:
    """The tracker called `name`, one of `TRACKERS`.

    `run` is what `describe_run` gave; `run_id` ties a resumed run to its beginning; `step` is the first to come.
    Raises `UserError` if there is no such tracker or its package is not installed.
    """
    if name not in TRACKERS:
        raise UserError(f"there is no tracker {name!r}; choose from {', '.join(TRACKERS)}")
    try:
        return TRACKERS[name](directory, run_id, run, step)
    except ImportError:
        raise UserError(f"tracker {name} is not installed; run {install_command(name)}") from None
    except OSError as error:
        raise UserError(f"tracker {name} cannot write below {directory}: {error.strerror or error}") from error


class _TensorBoard:
    def __init__(self, directory: Path, run_id: str, run: Mapping[str, Any], step: int) -> None:
        import tensorboard  # noqa: F401 - torch's own message would not name the extra
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, run_id: str, run: Mapping[str, Any], step: int) -> None:
        import wandb

        name = run["config"]["name"]
        self._run = wandb.init(
            project="longread", name=name, id=run_id, resume="allow", dir=str(directory), config=dict(run)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, directory: Path, run_id: str, run: Mapping[str, Any], step: int) -> None:
        import trackio

        name = f"{run['config']['name']}-{run_id}"
        self._trackio = trackio
        trackio.init(project="longread", name=name, resume="allow", config=dict(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
