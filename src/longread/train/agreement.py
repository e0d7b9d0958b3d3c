"""The agreement of a run with its beginning, and of all ranks: what decides a number, the data, the directory."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longread import files
from longread.config import RunConfig, UserError
from longread.data import TokenDataset
from longread.parallel import World

RUN_FILE = "run.json"
ROUNDING = ("recompute", "micro_batch_size")
"""Of a run's config, what changes nothing but the order of sums."""
_FREE = (*ROUNDING, "max_bad_steps", "bad_batch", "keep_checkpoints", "milestone_every")


def begun_config(out: str | Path) -> RunConfig | None:
    """The config of the run in the directory `out`; None if there is none."""
    path = Path(out) / RUN_FILE
    return RunConfig.from_dict(files.read_json(path, kind="run")["config"]) if os.path.exists(path) else None


def with_schedules_of(config: RunConfig, begun: RunConfig) -> RunConfig:
    """`config` with the steps of `begun`, and with its warm-ups and decay, which more steps would not change."""
    optimizer, inner = begun.optimizer, begun.inner
    return dataclasses.replace(
        config,
        steps=begun.steps,
        optimizer=dataclasses.replace(
            config.optimizer,
            initial_lr=optimizer.initial_lr,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=optimizer.decay_steps,
        ),
        inner=dataclasses.replace(config.inner, warmup_steps=inner.warmup_steps),
    )


def refuse_other_config(stored: Mapping[str, Any], config: RunConfig) -> None:
    """Raises `UserError` where `config` would compute other steps than the run did that `stored` belongs to."""
    begun, given = RunConfig.from_dict(dict(stored)).as_dict(complete=True), config.as_dict(complete=True)
    begun |= {name: given[name] for name in _FREE}
    # Rates depend on decay_steps, not on steps, so a longer run begins with the same steps as a shorter one.
    begun["steps"] = max(begun["steps"], given["steps"])
    for name, before, now in differences(begun, given):
        raise UserError(
            f"{name} was {before!r} when this run began and is {now!r} now; resume with what it was, "
            "or train into another directory"
        )


def refuse_other_data(stored: Mapping[str, Any], data: TokenDataset) -> None:
    """Raises `UserError` where `data` is not what `data_identity` described as `stored`."""
    for name, before, now in differences(stored, data_identity(data)):
        raise UserError(
            f"the {name} of the data was {before!r} when this run began and is {now!r} now; "
            "resume with the same data, or train into another directory"
        )


def refuse_differences(world: World, given: Mapping[str, Any]) -> None:
    """Raises `UserError` on all ranks where one was given something else than rank 0. JSON knows all of it."""
    theirs = world.first(given)
    with world.together("comparing what the ranks were given"):
        other = [name for name, value in given.items() if json.loads(json.dumps(value)) != theirs[name]]
        if world.size > 1 and other:
            raise UserError(f"rank {world.rank} has another {', '.join(other)} than rank 0; start all alike")


def refuse_other_directories(world: World, out: Path) -> None:
    """Raises `UserError` on all ranks where one does not see what rank 0 writes into the directory of the run."""
    seen = out / world.first(f".seen-{uuid.uuid4().hex[:8]}.tmp")
    with world.together("writing into the directory of the run"):
        if world.size > 1 and world.is_first:
            with files.writing(seen):
                seen.touch()
    with world.together("looking into the directory of the run"):
        if world.size > 1 and not seen.exists():
            raise UserError(f"{out} is not what rank 0 sees there; train where all machines see one directory")
    if world.is_first:
        seen.unlink(missing_ok=True)


def data_identity(data: TokenDataset) -> dict[str, Any]:
    """The identity of a data set."""
    return {
        "vocab_size": data.vocab_size,
        "tokenizer": data.tokenizer_fingerprint,
        "number of tokens": data.num_tokens,
        "index": files.digest(data.index, {}),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every field that differs."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new
