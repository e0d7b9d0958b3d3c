"""The cost of a step, as fields of its row in metrics.jsonl: operations, seconds, and how well the devices were used.

flops                  products of the whole batch, each once (longread.flops): the sum of the next three
inner_flops            of inner steps: mini-batches scored, and their gradients for the fast weights
outer_flops            of the rest: forward below and beside them, and the outer gradient
recomputed_flops       of what ran again for want of memory
seconds                of the whole step, waiting for the slowest rank included
gradient_seconds       forward and backward, of the slowest rank
reduce_seconds         the sum of the gradients over ranks; with several ranks only
update_seconds         clipping and AdamW, of the step before: on a GPU they run in the time of this one
gather_seconds         new weights to all ranks, likewise
mfu                    model FLOPs utilisation: inner_flops + outer_flops a second, as a share of what all GPUs of the
                       run reach at their dense bfloat16 peak (arXiv 2204.02311, appendix B); of known GPUs
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from longread.config import RunConfig
from longread.flops import TrainingFlops, step_flops
from longread.planning import peak_flops
from longread.train.step_clock import TOGETHER


class Throughput:
    """Makes these fields."""

    def __init__(self, config: RunConfig, ranks: int, device: torch.device) -> None:
        """`config` is that of all ranks."""
        self._ranks = ranks
        self._flops = cache(lambda recompute: step_flops(config, recompute))
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def fields(self, tokens: int, seconds: float, parts: Mapping[str, float], recompute: str) -> dict[str, Any]:
        """Of one step.

        Args:
            tokens: targets of all ranks.
            parts: seconds by part, 0 of what has not been measured.
            recompute: the schedule that was in force.
        """
        row: dict[str, Any] = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        for name, value in parts.items():
            if value and (self._ranks > 1 or name not in TOGETHER):
                row[f"{name}_seconds"] = value
        flops: TrainingFlops | None = self._flops(recompute)
        if flops is None:
            return row
        counts = {f"{name}_flops": round(count) for name, count in flops._asdict().items()}
        row |= {"flops": sum(counts.values())} | counts
        if self._peak is not None:
            row["mfu"] = flops.model / (seconds * self._ranks * self._peak)
        return row
