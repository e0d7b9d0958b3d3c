"""A trace of some steps of a run, of each rank, by torch.profiler.

    RUN/profile/rank-0.json    for https://ui.perfetto.dev or chrome://tracing; a large one is .json.gz
    RUN/profile/rank-0.txt     time by range, and the operators and kernels that took longest

Ranges are set where code runs step by step. A captured CUDA graph is one launch: it has kernels and no ranges.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from longread.config import RunConfig, UserError
from longread.files import atomic_files
from longread.inner_loop.step import INNER_STEP
from longread.model.transformer import RECOMPUTE
from longread.parallel import World
from longread.train.step_clock import OUTER_STEP, PARTS

PROFILE = "profile"
LARGE = 2**26
"""Bytes of a trace from which on it is compressed."""
RANGES = (RECOMPUTE, INNER_STEP, OUTER_STEP, *PARTS[1:])
"""Where ranges lie within one another, time belongs to the one that is named first."""
_LONGEST = 15


@dataclass(frozen=True)
class ProfiledSteps:
    """The steps from `first` to `last`, counted from 1. Raises `UserError` for what is no such range."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if self.first < 1:
            raise UserError(f"there is no step {self.first} to profile; steps are counted from 1")
        if self.last < self.first:
            raise UserError(f"profiled steps {self.first}:{self.last} end before they begin; give FIRST:LAST")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From FIRST:LAST, or one number."""
        first, colon, last = text.partition(":")
        try:
            numbers = int(first), int(last if colon else first)
        except ValueError:
            raise UserError(f"profiled steps are {text!r}; give FIRST:LAST, as in 10:12") from None
        return cls(*numbers)


@contextlib.contextmanager
def profiling(
    steps: ProfiledSteps | None, done: int, config: RunConfig, out: Path, world: World, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step of a run of which `done` steps are finished.

    The step before the first one is watched too, and thrown away. Raises `UserError` where the run does not come to
    these steps any more. A trace that cannot be written is a warning: the run is worth more.
    """
    if steps is None:
        yield lambda: None
        return
    if steps.last > config.steps:
        raise UserError(f"there is no step {steps.last} to profile: the run has {config.steps}; name earlier ones")
    if steps.first <= done:
        raise UserError(f"step {steps.first} cannot be profiled: the run goes on with step {done + 1}; name later ones")
    before = steps.first - 1 - done
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Profiler won't be using warmup")  # there may be no step before
        when = schedule(wait=max(0, before - 1), warmup=min(1, before), active=steps.last - steps.first + 1, repeat=1)
    path = out / PROFILE / f"rank-{world.rank}"

    def write(found: profile) -> None:
        try:
            write_profile(found, path, steps, device)
        except UserError as error:
            warnings.warn(f"no profile: {error}", stacklevel=2)

    with profile(activities=activities, schedule=when, on_trace_ready=write) as watching:
        yield watching.step


def write_profile(found: profile, path: Path, steps: ProfiledSteps, device: torch.device) -> None:
    """The trace as `path`.json, its table as `path`.txt. Raises `UserError` when they cannot be written."""
    trace, text = path.with_suffix(".json"), path.with_suffix(".txt")
    with atomic_files(text) as (temporary,):
        temporary.write_text(describe(found, steps, device), encoding="utf-8")
    with atomic_files(trace) as (temporary,):
        found.export_chrome_trace(str(temporary))
        if temporary.stat().st_size <= LARGE:
            return
        packed = trace.with_suffix(".json.gz")
        with atomic_files(packed) as (smaller,), temporary.open("rb") as whole, gzip.open(smaller, "wb") as file:
            shutil.copyfileobj(whole, file)
    trace.unlink()


def describe(found: profile, steps: ProfiledSteps, device: torch.device) -> str:
    """Milliseconds by range, on the CPU and, where ranges have kernels, on the GPU; then what took longest."""
    on_gpu = device.type == "cuda"
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in found.events() or ():
        if event.name in RANGES:
            key = event.device_type.name, event.name
            spans.setdefault(key, []).append((event.time_range.start, event.time_range.end))
    lines = [
        f"steps {steps.first} to {steps.last}",
        "",
        f"{'range':12s} {'times':>7s} {'CPU, ms':>10s} {'GPU, ms':>10s}",
    ]
    devices = ["CPU", "CUDA"] if on_gpu else ["CPU"]
    own = {kind: own_time({name: spans.get((kind, name), []) for name in RANGES}) for kind in devices}
    for name in RANGES:
        times = len(spans.get(("CPU", name), []))
        cells = "".join(f" {own[kind][name] / 1e3:10.3f}" for kind in devices)
        lines.append(f"{name:12s} {times:7d}{cells}")
    lines.append("Time in a range that lies within another is the inner one's; what was computed again comes first.")
    if on_gpu:
        lines.append("Where the gradient is a captured CUDA graph, ranges within it are those of its kernels alone.")
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=_LONGEST, max_name_column_width=60)
    return "\n".join([*lines, "", table, ""])


def own_time(spans: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Of each name, what its spans cover and those of the names before it do not."""
    own: dict[str, float] = {}
    taken: list[tuple[float, float]] = []
    for name, mine in spans.items():
        before, taken = covered(taken), [*taken, *mine]
        own[name] = covered(taken) - before
    return own


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on two streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
