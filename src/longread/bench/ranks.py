"""The measurement of one of several processes: the sum of gradients, its steps with others, and the same load alone.

All ranks run `measure_rank` together, one for each GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from longread.bench.cases import Case
from longread.bench.gate import GateFailed, GateResult, judged, refusing_fallbacks, small_config
from longread.bench.machine import free_memory, peak_gib, precision_on, seconds
from longread.config import OptimizerConfig, Parallelism, Recompute, RunConfig
from longread.data import Batch, Sampler
from longread.model import Transformer, find_device
from longread.parallel import ALONE, World, divide_state, joined
from longread.train.beginning import new_model
from longread.train.gradient import accumulate_gradient
from longread.train.optimizer import make_optimizer
from longread.train.outer_step import NotFinite, NothingLess, OuterStep
from longread.train.settling import precision_of, settled
from longread.train.sharing import Share, divided
from longread.train.stopping import StopSignal

_WARM_UP = 2
"""Steps that are not timed: the first compiles and captures, the second allocates what the first did not."""


class Steps(NamedTuple):
    """Timed steps, by the slowest rank of each."""

    seconds: list[float]
    peak_gib: float | None
    """Of the rank that took most."""
    micro_batch_size: int
    recompute: Recompute


class RankMeasurement(NamedTuple):
    """The measurement of all ranks; one of them says it for all."""

    verdict: GateResult
    together: Steps | None = None
    """None if the gate was red, or memory ran out."""
    alone: Steps | None = None
    """None too if one GPU alone has not enough memory."""
    red: str | None = None
    """Why a time must not be taken."""


class RandomTokens:
    """Batches of random tokens, which stand in for a `Sampler`: a function of step and rank like it."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The share of `rank`, on the CPU."""
        sequences, length = self._config.batch_size, self._config.context_length
        drawn = torch.Generator().manual_seed(step)
        tokens = torch.randint(self._config.model.vocab_size, (sequences, length + 1), generator=drawn)
        share = tokens.chunk(world_size)[rank]
        return Batch(share[:, :-1], share[:, 1:], torch.ones(len(share), length, dtype=torch.bool))


def measure_rank(case: Case, device_name: str, repeats: int, threads: int) -> RankMeasurement:
    """Joins the other ranks, and measures with them. What this rank returns, rank 0 returns too."""
    torch.set_num_threads(threads)
    with joined(device_name) as (world, place):
        device = find_device(place)
        parallelism = Parallelism(update=case.update, state=case.state)
        verdict = check_sum(case, device, world, parallelism)
        if not verdict.passed:
            return RankMeasurement(verdict, red=f"{verdict.name}, {verdict.detail}")
        try:
            return _measured(case, device, world, parallelism, verdict, repeats)
        except GateFailed as error:
            return RankMeasurement(verdict, red=str(error))


def _measured(
    case: Case, device: torch.device, world: World, parallelism: Parallelism, verdict: GateResult, repeats: int
) -> RankMeasurement:
    config = dataclasses.replace(case.config, batch_size=case.sequences * world.size // case.state)
    try:
        together = time_steps(config, device, world, parallelism, repeats)
    except NothingLess:
        return RankMeasurement(verdict)
    alone = None
    with world.together("one GPU alone"):
        if world.is_first:  # the others wait, and leave it what they share
            load = dataclasses.replace(
                case.config, micro_batch_size=together.micro_batch_size, recompute=together.recompute
            )
            with contextlib.suppress(NothingLess):
                alone = time_steps(load, device, ALONE, Parallelism(), repeats)
    return RankMeasurement(verdict, together, alone)


def time_steps(config: RunConfig, device: torch.device, world: World, parallelism: Parallelism, repeats: int) -> Steps:
    """Steps as `longread train` takes them, votes included, of random tokens. All ranks take them together.

    Raises `GateFailed` for a captured gradient that is not the plain one and for numbers that are not finite, and
    `NothingLess` where memory runs out.
    """
    free_memory(device)
    share, tokens = Share.of(world.launch, parallelism, config), RandomTokens(config)
    model = _model(config, device, world, parallelism)
    rows = divided(model, parallelism, world, device)
    with tempfile.TemporaryDirectory() as directory, refusing_fallbacks():
        step = OuterStep(
            config,
            settled(share.of_config(config), device, world, whole=config.model, divided=rows.count),
            model,
            make_optimizer(model, config.optimizer, rows),
            rows,
            sampler=cast("Sampler", tokens),
            share=share,
            world=world,
            device=device,
            out=Path(directory),
        )
        taken = []
        try:
            for number in range(_WARM_UP + repeats):
                world.agree(0, at="the beginning of a step")
                take = functools.partial(step.take, number, StopSignal(), is_due=lambda: False)
                taken.append(seconds(device, take))
        except NotFinite as error:
            raise GateFailed(f"in step {number + 1}: {error}") from None
        finally:
            step.release()
    slowest = world.agree(*taken[_WARM_UP:], at="the times of all")
    peak = peak_gib(device)
    if peak is not None:
        (peak,) = world.agree(peak, at="the peaks of all")
    exact = step.exact
    return Steps(list(slowest), peak, exact.micro_batch_size or exact.batch_size, exact.recompute)


def check_sum(case: Case, device: torch.device, world: World, parallelism: Parallelism) -> GateResult:
    """The gradient of a small network's batch summed over ranks, as they hold it after new values have gone round.

    Compared with float64, beside one GPU's gradient of the whole batch; every rank compares its own.
    """
    model, loss = small_config(case.method, case.config.model.head_dim), case.config.loss
    config = RunConfig(
        name="gate",
        model=model,
        loss=loss,
        optimizer=OptimizerConfig(lr=1.0),
        context_length=4 * model.mini_batch_size,
        batch_size=world.size,
        steps=1,
    )
    precision = precision_on(device)
    cpu, one = torch.device("cpu"), Parallelism()
    exact = summed_gradient(dataclasses.replace(config, precision="float64"), cpu, ALONE, one)
    config = dataclasses.replace(config, precision=precision)
    plain = summed_gradient(config, device, ALONE, one) if precision == "bfloat16" else None
    found = summed_gradient(config, device, world, parallelism)
    how = f"update {parallelism.update}" + (f", state {parallelism.state}" if parallelism.state > 1 else "")
    name = f"gradients of {world.size} ranks, {case.method}, {how}, {precision}"
    verdict = judged(name, found, exact, plain)
    (failed,) = world.agree(not verdict.passed, at="the gate")
    return verdict._replace(passed=not failed)


def summed_gradient(config: RunConfig, device: torch.device, world: World, parallelism: Parallelism) -> list[Tensor]:
    """The gradient of a batch of random tokens, summed over ranks and gathered again, on the CPU."""
    share = Share.of(world.launch, parallelism, config)
    model = _model(config, device, world, parallelism)
    rows = divided(model, parallelism, world, device)
    batch = RandomTokens(config).batch(0, share.index, share.count)
    part = dataclasses.replace(share.of_config(config), recompute="none")
    accumulate_gradient(model, part, batch.to(device), inner_lr=1.0)
    rows.reduce(1 / world.size)  # all have equally many sequences
    with torch.no_grad():
        for own in rows.own.values():
            if own.grad is not None:
                own.copy_(own.grad)
    rows.gather()
    return [parameter.detach().double().cpu() for parameter in model.parameters()]


def _model(config: RunConfig, device: torch.device, world: World, parallelism: Parallelism) -> Transformer:
    model = new_model(config, precision_of(config, device), device, drawn=True)
    model.state_group = divide_state(world, config.model, parallelism.state, device)
    return model
