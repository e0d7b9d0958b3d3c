"""A training step on several GPUs, beside the same load on one of them in the same run."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import statistics

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from longread.bench.cases import Case
from longread.bench.gate import GateFailed, GateResult
from longread.bench.ranks import RankMeasurement, Steps, measure_rank
from longread.bench.rows import Row, make_row
from longread.config import Parallelism, UserError
from longread.planning import Layout, load_of


def measure_parallel(case: Case, device: torch.device, *, repeats: int) -> tuple[Row, GateResult]:
    """Tokens per second of `case.gpus` together, of one alone, and the ratio; the gate that the ranks have passed.

    Raises:
        GateFailed: the sum of gradients is wrong, or the captured gradient is not the plain one.
        torch.OutOfMemoryError: it does not fit, however much is computed again.
        UserError: there are not so many GPUs.
    """
    if device.type == "cuda" and torch.cuda.device_count() < case.gpus:
        raise UserError(f"--gpus is {case.gpus}, and there are {torch.cuda.device_count()} GPUs; lower it")
    threads = max(1, torch.get_num_threads() // case.gpus)
    found = on_ranks(case, device.type, repeats, threads)
    if found.red is not None:
        raise GateFailed(found.red)
    if found.together is None:
        raise torch.OutOfMemoryError
    return _row(case, device, found.together, found.alone), found.verdict


def on_ranks(case: Case, device_name: str, repeats: int, threads: int) -> RankMeasurement:
    """The measurement of rank 0 of as many processes as `case.gpus`; `torchrun` does the same on the command line."""
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # else captured graphs and expandable segments do not go together
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=case.gpus,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # else the name of the machine, which it may not know itself
        max_restarts=0,
        run_id="longread-bench",
    )
    try:
        found: RankMeasurement = elastic_launch(launch, measure_rank)(case, device_name, repeats, threads)[0]
    except SignalException as stop:
        raise KeyboardInterrupt if stop.sigval == signal.SIGINT else SystemExit(128 + stop.sigval) from None
    return found


def _row(case: Case, device: torch.device, together: Steps, alone: Steps | None) -> Row:
    tokens = case.sequences * case.context
    rates = [case.gpus // case.state * tokens / taken for taken in together.seconds]
    row = make_row(case, rates, together.peak_gib, device, recompute=together.recompute)
    row |= {"gpus": case.gpus, "update": case.update, "state_parallel": case.state}
    row["estimated_gib"] = _estimated_gib(case, device, together)
    if alone is None:
        return row | {"one_gpu": None, "one_gpu_spread": None, "one_gpu_peak_gib": None, "ratio": None}
    one = [tokens / taken for taken in alone.seconds]
    return row | {
        "one_gpu": round(statistics.median(one), 1),
        "one_gpu_spread": [round(min(one), 1), round(max(one), 1)] if len(one) > 1 else None,
        "one_gpu_peak_gib": alone.peak_gib,
        "ratio": round(statistics.median(rates) / statistics.median(one), 3),
    }


def _estimated_gib(case: Case, device: torch.device, steps: Steps) -> float | None:
    """By `longread estimate`; None for a CPU, of which it knows nothing."""
    if device.type != "cuda":
        return None
    config = dataclasses.replace(
        case.config,
        batch_size=case.sequences * case.gpus // case.state,
        micro_batch_size=steps.micro_batch_size,
        recompute=steps.recompute,
    )
    layout = Layout(case.gpus, parallelism=Parallelism(update=case.update, state=case.state))
    return round(load_of(config, layout, math.inf).memory.total / 2**30, 1)
