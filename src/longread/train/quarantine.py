"""Batches whose loss or gradient was not finite, kept so that they can be looked at.

    RUN/quarantine/step-00000012-rank-0.safetensors    input_ids, target_ids, loss_mask: this rank's share of the batch

They hold text, so they are for their owner alone.
"""

from __future__ import annotations

from pathlib import Path

from longread.data import Batch
from longread.files import write_tensors_atomically

QUARANTINE = "quarantine"


def keep_batch(out: Path, step: int, rank: int, batch: Batch, problem: str) -> Path:
    """Writes the batch of `step`, counted from 1, and says where. Raises `UserError` when it cannot be written."""
    path = out / QUARANTINE / f"step-{step:08d}-rank-{rank}.safetensors"
    facts = {"step": step, "rank": rank, "problem": problem}
    # one sequence's inputs and targets are the same memory, which no file holds twice
    tensors = {name: tensor.clone() for name, tensor in batch._asdict().items()}
    write_tensors_atomically(path, tensors, facts, kind="batch", private=True)
    return path
