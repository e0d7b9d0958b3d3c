"""Random numbers as a function of a seed and of what they are for: no state, the same on every device.

The numbers are those of splitmix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"): its
mixing function, applied to a key and a counter. So an agent draws the same whether it is trained alone or beside
others, and a run that goes on needs no state of a generator.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Draws:
    """A stream of numbers for each of S seeds; `of` makes further ones."""

    def __init__(self, key: Tensor) -> None:
        self.key = key

    @classmethod
    def from_seeds(cls, seeds: Sequence[int], device: torch.device | str = "cpu") -> Draws:
        """One stream for each seed, which are whole numbers below 2^63."""
        return cls(_mixed(torch.tensor(list(seeds), dtype=torch.int64, device=device)))

    @property
    def count(self) -> int:
        """S, the number of seeds."""
        return len(self.key)

    def of(self, *purposes: str | int) -> Draws:
        """Streams that depend on this one and on `purposes`, and on nothing else."""
        key = self.key
        for purpose in purposes:
            number = purpose if isinstance(purpose, int) else zlib.crc32(purpose.encode()) + 2**32
            key = _mixed(key + _signed((number + 1) * _GOLDEN))
        return Draws(key)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1): [S, *shape] in float64."""
        counter = torch.arange(1, math.prod(shape) + 1, device=self.key.device) * _signed(_GOLDEN)
        bits = _shifted(_mixed(self.key[:, None] + counter), 11)
        return (bits.double() * 2.0**-53).view(self.count, *shape)

    def integers(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to limit − 1: [S, *shape] in int64."""
        return (self.uniform(*shape) * limit).long()

    def subset(self, size: int, of: int) -> Tensor:
        """`size` different numbers below `of`, in random order: [S, size]."""
        return self.uniform(of).argsort(-1)[:, :size]


def choose(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn from distributions over the last dimension, by numbers in [0, 1): [...] of [..., A] and [...]."""
    edges = probabilities.detach().double().cumsum(-1)
    return (edges[..., :-1] <= (uniform * edges[..., -1])[..., None]).sum(-1)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right; that of torch keeps the sign."""
    return (z >> by) & ((1 << (_BITS - by)) - 1)


def _signed(number: int) -> int:
    """A number modulo 2^64 as int64 holds it."""
    number &= (1 << _BITS) - 1
    return number - (1 << _BITS) if number >> (_BITS - 1) else number
