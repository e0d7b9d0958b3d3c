"""What the precision of the products does to a reading: every split gives the same numbers, but in bfloat16."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from longread.inner_loop import begin, read
from longread.model import Transformer
from tests import tiny

LENGTH = 9 * tiny.M + 1


def read_cut(model: Transformer, tokens: Tensor, cuts: list[int]) -> Tensor:
    """The NLL of all tokens but the first."""
    state, found = begin(model), []
    for first, last in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        reading = read(model, state, tokens[:, first:last], inner=tiny.INNER)
        state = reading.state
        found.append(reading.nll)
    return torch.cat(found, dim=1)[:, 1:]


def largest_difference(dtype: torch.dtype) -> float:
    """Over seven ways to cut one text, at 1 to all of its places."""
    model = tiny.make(3, torch.float64 if dtype == torch.float64 else torch.float32)
    model.compute_dtype = torch.bfloat16 if dtype == torch.bfloat16 else None
    assert model.dtype == dtype
    tokens = torch.tensor([tiny.text(LENGTH)])
    whole, worst = read_cut(model, tokens, []), 0.0
    for seed, places in enumerate([1, 7, 20] * 2 + [LENGTH - 1]):
        cuts = sorted(random.Random(seed).sample(range(1, LENGTH), places))
        worst = max(worst, (read_cut(model, tokens, cuts) - whole).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("dtype", "limit"), [pytest.param(torch.float64, 1e-13, marks=pytest.mark.slow), (torch.float32, 1e-5)], ids=str
)
def test_every_split_gives_the_same_numbers(dtype: torch.dtype, limit: float) -> None:
    assert largest_difference(dtype) < limit


def test_in_bfloat16_it_does_not() -> None:
    """Products of other shapes round differently: no promise is made for it, but that it stays near."""
    assert 1e-4 < largest_difference(torch.bfloat16) < 0.2
