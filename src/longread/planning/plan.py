"""The plan of a run on several GPUs: whether it fits, how long it takes, what it costs, or what would let it fit."""

from __future__ import annotations

from dataclasses import dataclass

from longread.config import RunConfig, UserError
from longread.planning.gpus import Gpu
from longread.planning.layout import Layout
from longread.planning.measured import Utilisation, utilisation
from longread.planning.memory import Load, load_of
from longread.planning.refusal import refusal
from longread.planning.timing import StepSeconds, step_seconds

_DAY, _HOUR = 86_400.0, 3600.0


@dataclass(frozen=True)
class Plan:
    """A run that fits."""

    config: RunConfig
    layout: Layout
    gpu: Gpu
    load: Load
    seconds: StepSeconds
    basis: Utilisation

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.context_length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds.total

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * _DAY

    @property
    def days(self) -> float:
        """Of all steps; evaluations, checkpoints and failures come on top."""
        return self.config.steps * self.seconds.total / _DAY

    def cost(self, price: float) -> float:
        """Of all steps, at a price for each GPU and hour."""
        return price * self.layout.all_gpus * self.config.steps * self.seconds.total / _HOUR


def plan_training(config: RunConfig, layout: Layout, gpu: Gpu) -> Plan:
    """The plan of `config` so laid out.

    Raises `UserError` if it does not fit, with what would let it, and if it cannot be laid out so.
    """
    basis, load = utilisation(config), load_of(config, layout, gpu.memory)
    if load.memory.total > gpu.memory:
        raise UserError(refusal(config, layout, gpu, load))
    return Plan(config, layout, gpu, load, step_seconds(config, layout, gpu, load), basis)
