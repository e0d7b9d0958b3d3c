"""How far the fast weights have moved, by hand."""

from __future__ import annotations

import pytest
import torch

from longread.inner_loop import drift
from longread.inner_loop.step import from_matrices, matrices
from tests.tiny import make


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_drift_is_relative_to_where_it_began_if_that_is_not_zero(scale: float) -> None:
    """Of each sequence alone: one has moved two numbers, by 3 and by 4, the other none."""
    model = make(0, torch.float64)
    with torch.no_grad():
        for block in model.suffix:
            for part in (block.fast_mlp.gate, block.fast_mlp.up, block.fast_mlp.down):
                part.weight.mul_(scale)
    initial = matrices(model.initial_fast_weights(2))
    moved = [w.clone() for w in initial]
    moved[0][1, 0, 0] += 3
    moved[-1][1, 2, 1] += 4
    size = torch.cat([w[0].flatten() for w in initial]).norm().item()
    found = drift(model, from_matrices(moved))
    assert found.tolist() == pytest.approx([0.0, 5 / size if scale else 5.0])
    assert not found.requires_grad
