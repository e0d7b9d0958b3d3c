"""Settings that a run leaves open and settles once, for all its steps: how much is computed at a time, and again.

The choice rests on estimates. Where one was too low and memory runs out, the next that takes less is settled on.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from longread.config import ModelConfig, Precision, RunConfig, UserError, recomputation
from longread.model import free_bytes
from longread.outer_loop import activation_budget, fit, graph_bytes
from longread.parallel import World
from longread.train.agreement import ROUNDING

LEANER = 0.9
"""Times the memory that ran out is what is tried next: each attempt costs the time of a step or more."""


def precision_of(config: RunConfig, device: torch.device) -> Precision:
    """The type of products."""
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


def settled(config: RunConfig, device: torch.device, world: World, *, whole: ModelConfig, divided: int) -> RunConfig:
    """`config`, of one rank's share of the work, with what it leaves open decided by what is free now on every rank.

    Warns if nothing fits.

    Args:
        whole: the network of the run, of which `config` has this rank's part.
        divided: as in `activation_budget`.
    """
    precision = precision_of(config, device)
    free = free_bytes(device) / (1 if device.type == "cuda" else world.launch.local_size)
    budget = activation_budget(free, whole, config.trained_blocks, divided=divided)
    found = fit(
        config,
        itemsize=_itemsize(precision),
        kernels=device.type == "cuda",
        budget=-world.agree(-budget, at="what memory is free")[0],
    )
    if found.missing:
        warnings.warn(
            f"{found.micro_batch_size} sequences of {config.context_length:,} tokens at a time need "
            f"{found.missing / 2**30:.1f} GiB more than there are, by an estimate; memory may run out",
            stacklevel=5,
        )
    return dataclasses.replace(
        config, micro_batch_size=found.micro_batch_size, recompute=found.recompute, precision=precision
    )


def settled_before(config: RunConfig, exact: RunConfig, state: Mapping[str, Any]) -> RunConfig:
    """`exact` with what the run that wrote `state` settled on, but for what `config` now asks for otherwise."""
    kept = {name: state.get(name, state["config"][name]) for name in ROUNDING}
    if kept["recompute"] == "auto":  # of revisions that could recompute nothing with the static loss
        kept["recompute"] = "none"
    kept["micro_batch_size"] = kept["micro_batch_size"] or exact.batch_size
    if exact.batch_size % kept["micro_batch_size"]:  # fewer sequences for each of more ranks
        kept["micro_batch_size"] = exact.micro_batch_size
    for name in ROUNDING:
        if getattr(config, name) != state["config"][name]:
            before, kept[name] = kept[name], getattr(exact, name)
            warnings.warn(
                f"{name} was {before!r} and is {kept[name]!r} from now on; sums round differently", stacklevel=6
            )
    return dataclasses.replace(exact, **kept)


def leaner(config: RunConfig, exact: RunConfig, device: torch.device) -> RunConfig | None:
    """The next that takes less memory than `exact`, of what `config` leaves open; None if there is nothing."""
    sequences = exact.micro_batch_size or exact.batch_size
    if config.micro_batch_size is None and sequences > 1:
        fewer = next(n for n in range(sequences - 1, 0, -1) if exact.batch_size % n == 0)
        return dataclasses.replace(exact, micro_batch_size=fewer)
    if config.recompute != "auto":
        return None
    need = graph_bytes(
        exact.model,
        exact.loss,
        batch_size=sequences,
        context_length=exact.context_length,
        itemsize=_itemsize(exact.precision),
        kernels=device.type == "cuda",
        trained_blocks=exact.trained_blocks,
    )
    now, leanest = need[exact.recompute], min(need, key=need.__getitem__)
    less = next((schedule for schedule, size in need.items() if size <= LEANER * now), leanest)
    return dataclasses.replace(exact, recompute=less) if need[less] < now else None


def out_of_memory(exact: RunConfig, step: int, kept: str) -> UserError:
    """The error of `step`, counted from 1, that did not fit; `kept` says what is left of the run."""
    size = exact.micro_batch_size or exact.batch_size
    remedies = [f"--set micro_batch_size={size // 2}"] if size > 1 else []
    lean = recomputation("sqrt", exact.model, exact.loss, exact.context_length)
    again = recomputation(exact.recompute, exact.model, exact.loss, exact.context_length)
    remedies += ["--set recompute=sqrt"] if again < lean else []
    remedies += ["--only suffix"] if exact.trained_blocks is None else []
    return UserError(
        f"out of memory at step {step}: {size} sequences of {exact.context_length:,} tokens at a time with recompute "
        f"{exact.recompute} are too much; {', '.join([*remedies, 'a shorter context'])} or a smaller model needs less, "
        f"and {kept}"
    )


def _itemsize(precision: Precision) -> int:
    return {"bfloat16": 2, "float64": 8}.get(precision, 4)
