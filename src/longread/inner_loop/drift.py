"""How far reading has moved the fast weights."""

import torch
from torch import Tensor

from longread.inner_loop.step import matrices
from longread.model import FastWeights, Transformer


@torch.no_grad()
def drift(model: Transformer, fast: FastWeights) -> Tensor:
    """‖W − W_0‖ / ‖W_0‖ over all fast weights of each sequence, [B]. Where all of W_0 is 0 it is ‖W − W_0‖.

    Args:
        fast: of the suffix, which has at least one block; on any device. One matrix at a time goes there.
    """
    moved, initial = [], []
    for w, w0 in zip(matrices(fast), matrices(model.initial_fast_weights(1)), strict=True):
        there = w0.to(w.device)
        moved.append((w - there).flatten(1).square_().sum(1))
        initial.append(there.flatten(1).square().sum(1))
    distance, size = torch.stack(moved).sum(0).sqrt(), torch.stack(initial).sum(0).sqrt()
    return torch.where(size > 0, distance / size, distance)
