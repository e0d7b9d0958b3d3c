"""Why a run does not fit, and what would let it: each change alone, or several together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from longread.config import Parallelism, RunConfig, Update, UserError
from longread.planning.gpus import Gpu
from longread.planning.layout import Layout
from longread.planning.memory import Load, load_of

NODE = 8
"""GPUs that a node of the table's GPUs has."""
MODEST = 3
"""Doublings or halvings of one thing that are proposed alone."""
_GIB = 2**30


class _Change(NamedTuple):
    """A run laid out otherwise, and the option that says so."""

    option: str
    config: RunConfig
    layout: Layout


def refusal(config: RunConfig, layout: Layout, gpu: Gpu, load: Load) -> str:
    """One sentence: what a GPU would need, what it has, and what to change."""
    where = f"update {layout.parallelism.update} on {layout.all_gpus} × {gpu.name}"
    what = (
        f"{config.context_length:,} tokens with {where} need {_gib(load.memory.total)} of a GPU's "
        f"{_gib(gpu.memory)} by an estimate (recompute {load.recompute}); "
    )
    if alone := [found for way in _WAYS if (found := _first_that_fits(way(config, layout)[:MODEST], gpu))]:
        return what + " or ".join(f"{change.option} ({_gib(size)})" for change, size in alone) + " would fit"
    options, size = _together(config, layout, gpu)
    if size <= gpu.memory:
        return f"{what}{' '.join(options)} together would fit ({_gib(size)})"
    rest = f", as even with {' '.join(options)} it needs {_gib(size)}" if options else ""
    return f"{what}take a GPU with more memory or a smaller model{rest}"


def _together(config: RunConfig, layout: Layout, gpu: Gpu) -> tuple[list[str], float]:
    """Changes one on top of the other until the run fits, or all; and the bytes that it then needs."""
    options: list[str] = []
    least = load_of(config, layout, gpu.memory).memory.total
    for way in _WAYS:
        changes = way(config, layout)
        found = _first_that_fits(changes, gpu) or _leanest(changes, gpu)
        if found is None or found[1] >= least:
            continue
        (option, config, layout), least = found
        options.append(option)
        if least <= gpu.memory:
            break
    return options, least


def _first_that_fits(changes: Sequence[_Change], gpu: Gpu) -> tuple[_Change, int] | None:
    return next((found for found in _sized(changes, gpu) if found[1] <= gpu.memory), None)


def _leanest(changes: Sequence[_Change], gpu: Gpu) -> tuple[_Change, int] | None:
    return min(_sized(changes, gpu), key=lambda found: found[1], default=None)


def _sized(changes: Sequence[_Change], gpu: Gpu) -> Iterator[tuple[_Change, int]]:
    for change in changes:
        with contextlib.suppress(UserError):  # what cannot be laid out so is no remedy
            yield change, load_of(change.config, change.layout, gpu.memory).memory.total


def _fewer(config: RunConfig, layout: Layout) -> list[_Change]:
    if config.micro_batch_size in (None, 1):
        return []
    return [_Change("--train 1", dataclasses.replace(config, micro_batch_size=1), layout)]


def _recomputing(config: RunConfig, layout: Layout) -> list[_Change]:
    if config.recompute == "auto":
        return []
    return [_Change("--recompute auto", dataclasses.replace(config, recompute="auto"), layout)]


def _dividing(config: RunConfig, layout: Layout) -> list[_Change]:
    updates: tuple[Update, ...] = ("replicated", "shared", "fully-sharded")
    leaner = updates[updates.index(layout.parallelism.update) + 1 :]
    return [
        _Change(f"--update {update}", config, dataclasses.replace(layout, parallelism=Parallelism(update=update)))
        for update in leaner
        if layout.parallelism.state == 1
    ]


def _more_gpus(config: RunConfig, layout: Layout) -> list[_Change]:
    changes = []
    gpus = 2 * layout.gpus
    while gpus <= NODE:
        more = dataclasses.replace(layout, gpus=gpus)
        changes.append(_Change(f"--gpus {gpus}", config, more))
        gpus *= 2
    return changes


def _state_parallel(config: RunConfig, layout: Layout) -> list[_Change]:
    update, P = layout.parallelism.update, layout.parallelism.state
    if update == "fully-sharded":
        return []
    ways = [n for n in range(2 * P, layout.gpus + 1, P) if layout.gpus % n == 0]
    laid = [dataclasses.replace(layout, parallelism=Parallelism(update=update, state=n)) for n in ways]
    return [_Change(f"--state-parallel {n}", config, each) for n, each in zip(ways, laid, strict=True)]


def _shorter(config: RunConfig, layout: Layout) -> list[_Change]:
    changes = []
    length = config.context_length
    while length % 2 == 0 and (length := length // 2) % config.model.mini_batch_size == 0:
        shorter = dataclasses.replace(config, context_length=length)
        changes.append(_Change(f"--context-length {length}", shorter, layout))
    return changes


def _suffix_only(config: RunConfig, layout: Layout) -> list[_Change]:
    suffix = config.model.num_suffix_blocks
    if config.trained_blocks is not None or not suffix:
        return []
    return [_Change("--only suffix", dataclasses.replace(config, trained_blocks=suffix), layout)]


_WAYS: tuple[Callable[[RunConfig, Layout], list[_Change]], ...] = (
    _fewer,
    _recomputing,
    _dividing,
    _more_gpus,
    _state_parallel,
    _shorter,
    _suffix_only,
)
"""In the order in which they are proposed: what changes the result comes last."""


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"
