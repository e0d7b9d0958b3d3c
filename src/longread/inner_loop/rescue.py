"""The rescue of a reader that learning has broken although no single step was refused.

A guard (`read(..., guard=True)`) refuses steps that are no numbers or far too long. Many short steps can still lead
where the reader predicts worse than one that knows nothing. Whether learning or the text is to blame shows by reading
the same tokens frozen: a strange text is strange to every reader, and nothing is lost by having learned from it.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.reading import Reading, begin, read
from longread.inner_loop.state import ReadingState
from longread.model import Transformer

FEWEST = 32
"""Tokens on which a verdict can rest, or a mini-batch if that is shorter."""
MARGIN = 1.0
"""Nats per token by which a frozen reader must be better."""


def rescue(
    model: Transformer, before: ReadingState, tokens: Tensor, reading: Reading, *, inner: InnerConfig
) -> ReadingState | None:
    """A state to go on with where learning has broken the reader of one text; None where it has not.

    It is looked for only when the newest tokens, at most a mini-batch, cost more than ln V + `MARGIN` each. Then the
    tokens are read again without learning, with the weights before them and, if these are broken too, with W_0.

    Args:
        before: the state that `tokens`, int64 [1, n], were read from; `reading` is what came of it.
    """
    newest = min(tokens.shape[1], model.config.mini_batch_size)
    if newest < min(FEWEST, model.config.mini_batch_size) or not model.config.num_suffix_blocks:
        return None
    learned = _mean(reading.nll, newest)
    if learned <= math.log(model.config.vocab_size) + MARGIN:
        return None
    for fast in (before.fast, begin(model).fast):
        frozen = read(model, dataclasses.replace(before, fast=fast), tokens, inner=inner, learn=False)
        cost = _mean(frozen.nll, newest)
        if math.isfinite(cost) and not cost >= learned - MARGIN:
            return frozen.state
    return None


def _mean(nll: Tensor, newest: int) -> float:
    """Of the newest tokens; the first token of a text has no loss."""
    nll = nll[0, -newest:]
    return (nll[1:] if nll[0].isnan() else nll).mean().item()
