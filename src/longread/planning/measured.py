"""Measured times of training steps on one GPU, and the share of its peak that follows for one that was not measured."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from longread.config import Recompute, RunConfig, UserError
from longread.flops import recomputed_flops, training_flops
from longread.planning.gpus import GPUS, Gpu
from longread.recipes import Method, recipe

COPYING = 0.85
"""Of a nominal memory bandwidth, what copying reached on an H200 (4.03 to 4.10 of 4.8 TB/s, in the same runs)."""
UPDATE_TRAFFIC = 28
"""Bytes a parameter that AdamW reads (value, gradient, both moments) and writes (value, moments), in float32."""
FAR = 4.0
"""Times the parameters of the nearest measurement, or part of them, beyond which it says little."""


class Measured(NamedTuple):
    """The median step of `longread bench train` on one H200 (benchmarks/results/h200.json)."""

    size: str
    method: Method
    context: int
    sequences: int
    tokens_per_s: float
    recompute: Recompute


MEASURED_ON = GPUS["h200"]
MEASURED = (
    Measured("125m", "e2e", 8192, 4, 163_212.0, "none"),
    Measured("125m", "e2e", 131_072, 1, 100_059.7, "none"),
    Measured("760m", "e2e", 8192, 1, 32_510.7, "none"),
    Measured("760m", "e2e", 32_768, 1, 28_158.5, "none"),
    Measured("760m", "e2e", 131_072, 1, 22_184.4, "sqrt"),
    Measured("3b", "e2e", 8192, 1, 12_467.5, "none"),
    Measured("3b", "e2e", 32_768, 1, 8991.8, "sqrt"),
    Measured("3b", "e2e", 65_536, 1, 8514.9, "sqrt"),
    Measured("125m", "swa", 8192, 4, 241_417.8, "none"),
    Measured("125m", "swa", 131_072, 1, 185_775.0, "none"),
    Measured("760m", "swa", 8192, 1, 51_908.8, "none"),
    Measured("760m", "swa", 32_768, 1, 48_776.2, "none"),
    Measured("760m", "swa", 131_072, 1, 43_007.5, "blocks"),
    Measured("3b", "swa", 8192, 1, 19_626.7, "none"),
    Measured("3b", "swa", 32_768, 1, 15_871.2, "blocks"),
    Measured("125m", "full", 8192, 4, 241_876.4, "none"),
    Measured("125m", "full", 131_072, 1, 45_083.2, "none"),
    Measured("760m", "full", 8192, 1, 53_709.2, "none"),
    Measured("760m", "full", 32_768, 1, 32_599.3, "none"),
    Measured("760m", "full", 131_072, 1, 10_713.2, "blocks"),
    Measured("3b", "full", 8192, 1, 19_890.7, "none"),
    Measured("3b", "full", 32_768, 1, 10_980.4, "blocks"),
    Measured("3b", "full", 65_536, 1, 7093.3, "blocks"),
)


class Utilisation(NamedTuple):
    """The share of the peak of bfloat16 products that a step reaches, what is computed again included."""

    share: float
    row: Measured
    """The measurement that it was taken from."""
    is_far: bool
    """Whether that one was of a much larger or smaller network."""


def update_seconds(parameters: float, gpu: Gpu) -> float:
    """That AdamW takes for so many parameters, from its traffic alone."""
    return UPDATE_TRAFFIC * parameters / (COPYING * gpu.memory_bandwidth)


def utilisation(config: RunConfig) -> Utilisation:
    """That of the nearest measurement with the same kind of network, by ratios of parameters and of context.

    The nearest of the others predicts each of those above within 19 %, and within 10 % where it has the same size.

    Raises `UserError` for networks of which nothing was measured: other mixers than attention.
    """
    if config.model.mixer != "attention":
        raise UserError(
            f"the time of training with model.mixer {config.model.mixer} cannot be planned: its operations are not "
            "counted; plan one with attention"
        )
    return nearest(config.model.num_parameters, config.context_length, kind_of(config))


def kind_of(config: RunConfig) -> Method:
    """The measured method whose network is most alike."""
    if config.loss == "end-to-end":
        return "e2e"
    return "swa" if config.model.attention == "window" else "full"


def nearest(parameters: int, context: int, kind: Method, *, leave_out: Measured | None = None) -> Utilisation:
    """The utilisation of the measurement that is nearest, one of them left out if asked for."""

    def size_ratio(row: Measured) -> float:
        return abs(math.log2(parameters / _parameters(row)))

    rows = [row for row in MEASURED if row.method == kind and row != leave_out]
    row = min(rows, key=lambda row: size_ratio(row) + abs(math.log2(context / row.context)))
    return Utilisation(_share(row), row, size_ratio(row) > math.log2(FAR))


@cache
def _share(row: Measured) -> float:
    config = recipe(row.size, row.method)
    work = training_flops(config.model, row.context, config.loss)
    work += recomputed_flops(config.model, row.context, config.loss, row.recompute)
    tokens = row.context * row.sequences
    seconds = tokens / row.tokens_per_s - update_seconds(_parameters(row), MEASURED_ON)
    return work * tokens / seconds / MEASURED_ON.flops


@cache
def _parameters(row: Measured) -> int:
    return recipe(row.size, row.method).model.num_parameters
