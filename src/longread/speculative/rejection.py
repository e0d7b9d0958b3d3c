"""Speculative sampling (arXiv 2211.17192, 2302.01318): guesses from q become samples from p.

A guess d ~ q is kept with probability min(1, p(d) / q(d)). Where it is not, the token is drawn from the normalized
max(0, p − q). Then a token x comes out with probability

    min(p(x), q(x)) + (1 − Σ min(p, q)) · max(0, p(x) − q(x)) / Σ max(0, p − q) = p(x)

because 1 − Σ min(p, q) = Σ max(0, p − q). Guesses after one that is not kept are dropped, and where all are kept there
is one more token from p. None of this asks what q is, so it may change with everything that has been written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What is kept of k guesses."""

    accepted: Tensor
    """How many from the first on, int64 []."""
    rest: Tensor
    """The distribution of the token after them, [V]; weights that need not sum to 1."""


def verdict(p: Tensor, q: Tensor, guesses: Tensor, uniform: Tensor) -> Verdict:
    """Keeps or drops guesses.

    Args:
        p: [k + 1, V], what the verifier expects in the place of each guess, given those before it, and after the last.
        q: [k, V], what each guess was drawn from.
        guesses: int64 [k].
        uniform: [k], independent of everything, from [0, 1).
    """
    k = len(guesses)
    expected, drawn = (x[:k].gather(1, guesses.unsqueeze(1)).squeeze(1) for x in (p, q))
    accepted = (uniform * drawn < expected).long().cumprod(0).sum()
    # the token after the accepted guesses: q is 0 behind the last guess, so p − q is p there
    at_rest = torch.cat((q, torch.zeros_like(p[:1])))
    wanted = p.index_select(0, accepted.unsqueeze(0))[0]
    rest = (wanted - at_rest.index_select(0, accepted.unsqueeze(0))[0]).clamp(min=0)
    return Verdict(accepted, torch.where(rest.sum() > 0, rest, wanted))  # equal but for rounding: then p itself
