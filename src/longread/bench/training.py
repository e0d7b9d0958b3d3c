"""The time of a training step, as `longread train` takes it, and of the first one in a fresh process."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from longread.bench.cases import Case
from longread.bench.gate import GateFailed, refusing_fallbacks
from longread.bench.machine import free_memory, peak_gib, precision_on, seconds, synchronize
from longread.bench.process import empty_caches, in_a_process
from longread.bench.profile import profiled
from longread.bench.rows import Row, make_row
from longread.config import Recompute, RunConfig
from longread.data import Batch
from longread.model import Transformer, initialize, is_out_of_memory
from longread.outer_loop import UPDATE_BYTES, graph_bytes
from longread.train.captured import CapturedGradient
from longread.train.gradient import accumulate_gradient
from longread.train.optimizer import gradient_norm, make_optimizer, update
from longread.train.rehearsal import precompile_step
from longread.train.stopping import not_finite_in

NEARLY = 1.15
"""Times the memory of the device that an estimate may be, since estimates are off by so much."""
LEANER = 0.95
"""Times the memory of one schedule that the next one to be tried takes at most."""
T = TypeVar("T")


class TrainingStep:
    """A drawn model, its optimizer, and one step after the other on batches of random tokens.

    Raises:
        GateFailed: when called, if the captured gradient is not the plain one, or a number is not finite.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device, self._count = config, device, 0
        precompile_step(dataclasses.replace(config, precision=precision_on(device)), device)
        with device:
            self._model = Transformer(config.model)
        initialize(self._model, seed=0)
        if precision_on(device) == "bfloat16":
            self._model.compute_dtype = torch.bfloat16
        self._optimizer = make_optimizer(self._model, config.optimizer)
        self._gradient = (
            CapturedGradient(self._model, config)
            if device.type == "cuda"
            else functools.partial(accumulate_gradient, self._model, config)
        )

    def batch(self) -> Batch:
        """Another batch of random tokens, on the CPU, as the sampler would give it."""
        shape = self._config.batch_size, self._config.context_length + 1
        tokens = torch.randint(self._config.model.vocab_size, shape)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(shape[0], shape[1] - 1, dtype=torch.bool))

    def __call__(self, batch: Batch) -> None:
        """One step: gradient, its norm, the check that all is finite, clipping, AdamW."""
        inner_lr = self._config.inner.lr_at(self._count)
        found = self._gradient(batch.to(self._device), inner_lr=inner_lr)
        norm = gradient_norm(self._model.parameters())
        gradients = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        problem = not_finite_in(gradients, found, norm)
        if problem is not None:
            raise GateFailed(f"in step {self._count + 1} {problem}")
        update(self._model, self._optimizer, self._config.optimizer, self._count, norm)
        found.loss.item(), norm.item()
        self._count += 1


def schedules(config: RunConfig, device: torch.device) -> list[Recompute]:
    """Schedules of recomputation, in the order in which it is tried: of all that fit by an estimate, or nearly, the
    first, and then each that takes less by so much that an attempt is worth its time."""
    need = graph_bytes(
        config.model,
        config.loss,
        batch_size=config.batch_size,
        context_length=config.context_length,
        itemsize=2 if precision_on(device) == "bfloat16" else 4,
        kernels=device.type == "cuda",
    )
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    room -= (4 + UPDATE_BYTES) * config.model.num_parameters
    found: list[Recompute] = []
    most = NEARLY * room
    for schedule, size in need.items():
        if size < most:
            found.append(schedule)
            most = LEANER * size
    return found or [min(need, key=need.__getitem__)]


def _first_that_fits(case: Case, device: torch.device, measure: Callable[[Recompute], T]) -> T:
    *first, last = schedules(case.config, device)
    for schedule in first:
        try:
            return measure(schedule)
        except RuntimeError as error:  # of a capture that ran out of memory, too
            if not is_out_of_memory(error):
                raise
        free_memory(device)
    return measure(last)


def measure_training(
    case: Case, device: torch.device, *, repeats: int, profile: bool = False
) -> tuple[Row, str | None]:
    """Tokens per second of steps after the second; the profile of one step, if wanted.

    Raises:
        GateFailed: the captured gradient is not the plain one.
        torch.OutOfMemoryError: it does not fit, however much is computed again.
    """

    def measure(schedule: Recompute) -> tuple[Row, str | None]:
        free_memory(device)
        step = TrainingStep(dataclasses.replace(case.config, recompute=schedule), device)
        with refusing_fallbacks():
            for _ in range(2):  # the first compiles and captures, the second allocates what the first did not
                step(step.batch())
        batches = [step.batch() for _ in range(repeats)]
        times = [seconds(device, functools.partial(step, batch)) for batch in batches]
        tokens = case.sequences * case.context
        row = make_row(case, [tokens / s for s in times], peak_gib(device), device, recompute=schedule)
        text = profiled(device, lambda: step(batches[0]), tokens / row["value"] * 1e3) if profile else None
        return row, text

    return _first_that_fits(case, device, measure)


def measure_first_step(case: Case, device: torch.device) -> Row:
    """Seconds of the first step in a process of its own, with caches of compiled kernels that are empty.

    Before the clock starts, Python, PyTorch and the device are up, the weights drawn and the batch made.
    """

    def measure(schedule: Recompute) -> Row:
        return make_row(case, *_in_a_process(case, schedule, device), device, recompute=schedule)

    return _first_that_fits(case, device, measure)


def _in_a_process(case: Case, recompute: Recompute, device: torch.device) -> tuple[list[float], float | None]:
    free_memory(device)
    with empty_caches():
        return in_a_process(_first_step, case, recompute, str(device))


def _first_step(case: Case, recompute: Recompute, device_name: str) -> tuple[list[float], float | None]:
    device = torch.device(device_name)
    free_memory(device)
    step = TrainingStep(dataclasses.replace(case.config, recompute=recompute), device)
    batch = step.batch()
    synchronize(device)
    with refusing_fallbacks():
        taken = seconds(device, functools.partial(step, batch))
    return [taken], peak_gib(device)
