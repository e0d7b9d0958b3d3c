"""Linear maps with a leading dimension of seeds: S networks of one shape, side by side in one product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longread.thinking.draws import Draws


class EnsembleLinear(nn.Module):
    """y = x W + b for each of S networks; uniform within ±1/√inputs at the start, or zero."""

    def __init__(self, draws: Draws, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else 1 / math.sqrt(inputs)
        drawn = (2 * draws.uniform(inputs + 1, outputs) - 1) * bound
        drawn = drawn.to(torch.get_default_dtype())
        self.weight = nn.Parameter(drawn[:, :-1].contiguous())
        self.bias = nn.Parameter(drawn[:, -1:].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """[S, ..., inputs] -> [S, ..., outputs]"""
        y = torch.baddbmm(self.bias, x.reshape(x.shape[0], -1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


def one_hot(index: Tensor, size: int) -> Tensor:
    """[...] -> [..., size] in the default type of floating point numbers."""
    places = torch.arange(size, device=index.device)
    return (index[..., None] == places).to(torch.get_default_dtype())
