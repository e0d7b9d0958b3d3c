"""Training on several GPUs, before anything is trained: what fits, how long it takes, what it costs.

gpus       what a GPU gives by its vendor
layout     which GPUs share sequences, and which the optimizer's state
memory     bytes on one GPU
measured   training steps on one GPU, and the share of the peak that follows for others
timing     seconds of a step: computing and communicating
plan       all of it
refusal    why a run does not fit, and what would let it
"""

from __future__ import annotations

from longread.planning.gpus import GPUS, Gpu, gpu_named, peak_flops
from longread.planning.layout import Layout
from longread.planning.memory import GpuMemory, Load, load_of, state_bytes
from longread.planning.plan import Plan, plan_training
from longread.planning.timing import StepSeconds, step_seconds

__all__ = [
    "GPUS",
    "Gpu",
    "GpuMemory",
    "Layout",
    "Load",
    "Plan",
    "StepSeconds",
    "gpu_named",
    "load_of",
    "peak_flops",
    "plan_training",
    "state_bytes",
    "step_seconds",
]
