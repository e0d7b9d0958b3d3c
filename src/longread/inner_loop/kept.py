"""A memory beyond the window at constant cost: keys and values of the tokens that surprised most.

Each attention sees, beside its window, `ModelConfig.kept_tokens` tokens that have left it. Which ones is decided by
what they cost when they were predicted. One rare word costs much and says little, while a fact that cannot be guessed
costs something at every token. So no token counts for more than `MOST` nats, and runs of tokens are weighed: a run by
how much its mean is above that of the text around it, times the root of its length, as a scan statistic weighs
stretches of several lengths (Kulldorff 1997, https://doi.org/10.1080/03610929708831995). Lengths are `kept_run` and a
third of it, and a token counts as surprising as the most surprising run that it lies in. The first token of all, which
nothing predicts, and its run stay for good: models lean on it (attention sinks, arXiv 2309.17453).

It is decided where a mini-batch begins, about all tokens that leave the window while it is read; until it has left the
window, a kept token is not seen twice. So a token sees its window, and of all tokens before it those that were kept
when its mini-batch began. What follows changes none of this.

Keys are kept as they were made, turned by the rotary embedding at their own positions. Those farther away than
`kept_distance` from where the mini-batch begins are turned on, so that they seem to lie there: all beyond the window at
one position, as in InfLLM (arXiv 2402.04617), since at distances that training never had no key would be understood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.model import LongPast, Past, Rotary, Transformer
from longread.ops.attention import Further
from longread.ops.rotary import rotate

FIRST = 1e6
"""Cost of what nothing predicts, nats; a number, as files hold no infinities."""
MOST = 2.5
"""Nats that one token counts for at most: about what a digit costs that nothing foretells, ln 10 = 2.3."""
SHORTER = 3
"""Runs of `kept_run`, and of so many times fewer tokens."""


class Kept(NamedTuple):
    """Of B sequences, what they keep, and what it is decided by."""

    lower: tuple[Past, ...]
    upper: tuple[Past, ...]
    """Of each attention the n tokens that are kept, oldest first."""
    position: Tensor
    """Of these, int64 [B, n]."""
    surprise: Tensor
    """Of these, [B, n], float32 or wider."""
    nll: Tensor
    """Of the u tokens about which nothing is decided, the newest, and of the `kept_run` − 1 before them (0 where there
    were none), [B, kept_run − 1 + u]."""

    @property
    def tensors(self) -> list[Tensor]:
        return [*(x for past in (*self.lower, *self.upper) for x in past), self.position, self.surprise, self.nll]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Kept:
        """With every tensor changed, in the order of `tensors`."""
        lower, upper = (tuple(Past(*map(change, past)) for past in half) for half in (self.lower, self.upper))
        return Kept(lower, upper, change(self.position), change(self.surprise), change(self.nll))

    def after(self, nll: Tensor) -> Kept:
        """After tokens that cost nll [B, T] have been read."""
        return self._replace(nll=torch.cat((self.nll, nll.nan_to_num(FIRST, FIRST).to(self.nll.dtype)), dim=1))


def nothing_kept(model: Transformer, batch_size: int) -> Kept:
    """Of sequences that begin."""
    lower, upper = model.empty_pasts(batch_size)
    wide = torch.promote_types(model.dtype, torch.float32)
    none = torch.zeros(batch_size, 0, device=model.device, dtype=wide)
    return Kept(lower, upper, none.long(), none, none.new_zeros(batch_size, model.config.kept_run - 1))


def kept_nbytes(model: Transformer) -> int:
    """Bytes of it for one sequence, at most."""
    config, itemsize = model.config, model.dtype.itemsize
    if not config.kept_tokens:
        return 0
    facts = 8 + max(4, itemsize), max(4, itemsize)
    tokens = config.kept_tokens * (2 * config.num_blocks * config.kv_width * itemsize + facts[0])
    return tokens + (config.window_size + config.kept_run - 1) * facts[1]


def undecided(model: Transformer, kept: Kept) -> int:
    """How many of the newest tokens nothing is decided about; all of them are in the window still."""
    return kept.nll.shape[1] - (model.config.kept_run - 1)


def decided(
    model: Transformer, kept: Kept, lower: Sequence[Past], upper: Sequence[Past], position: int | Tensor
) -> Kept:
    """What is kept while the mini-batch is read that begins now.

    Args:
        lower, upper: the pasts of all attentions, which hold the undecided tokens.
        position: of the next token; [B] where each sequence is somewhere else.
    """
    config, u = model.config, undecided(model, kept)
    leaving = u + config.mini_batch_size - config.window_size
    if leaving <= 0:
        return kept
    around = _surprises(kept.nll, u, config.kept_run)[:, :leaving]
    surprise = torch.cat((kept.surprise, around), dim=1)
    first = torch.as_tensor(position, device=surprise.device).reshape(-1, 1) - u
    new = (first + torch.arange(leaving, device=surprise.device)).expand(len(surprise), -1)
    chosen = _most_surprising(surprise, config.kept_tokens)

    def of(held: Past, past: Past) -> Past:
        begin = past.key.shape[2] - u
        found = (torch.cat((x, y[:, :, begin : begin + leaving]), 2) for x, y in zip(held, past, strict=True))
        index = chosen[:, None, :, None].expand(-1, held.key.shape[1], -1, held.key.shape[3])
        return Past(*(x.gather(2, index) for x in found))

    return Kept(
        tuple(map(of, kept.lower, lower)),
        tuple(map(of, kept.upper, upper)),
        torch.cat((kept.position, new), dim=1).gather(1, chosen),
        surprise.gather(1, chosen),
        kept.nll[:, leaving:],
    )


def _surprises(nll: Tensor, undecided: int, run: int) -> Tensor:
    """How surprising each of the newest tokens is, [B, undecided], by the runs that end among them.

    Args:
        nll: of these and of the `run` − 1 tokens before them.
    """
    costs = nll.clamp(0, MOST)
    usual = costs[:, -undecided:].mean(1, keepdim=True)
    costs = torch.where(nll < FIRST, costs, nll)
    found = []
    for length in {run, max(1, run // SHORTER)}:
        means = costs[:, 1 - length - undecided :].unfold(1, length, 1).mean(-1)  # of the runs that end with each
        above = torch.nn.functional.pad((means - usual) * length**0.5, (0, length - 1), value=-math.inf)
        found.append(above.unfold(1, length, 1).amax(-1))
    return torch.stack(found).amax(0)


def _most_surprising(surprise: Tensor, count: int) -> Tensor:
    """Indices of the largest of each row, ascending; of equals the later ones. int64 [B, min(n, count)]."""
    n = surprise.shape[1]
    order = surprise.flip(1).argsort(dim=1, descending=True, stable=True)[:, :count]
    return (n - 1 - order).sort(dim=1).values


def long_pasts(
    model: Transformer,
    kept: Kept,
    pasts: Sequence[Past],
    *,
    lower: bool,
    position: int | Tensor,
    start: int | Tensor,
    tokens: int,
) -> tuple[LongPast, ...]:
    """The pasts of one half of the network, and beside each what it keeps, for `Transformer.lower` or `upper`.

    Args:
        position: of the next token of the state that these are of.
        start: of the first of so many `tokens` that are to see it; they lie in the same mini-batch.
    """
    config = model.config
    like = kept.position
    window = config.window_size
    queries = torch.as_tensor(start, device=like.device).reshape(-1, 1) + torch.arange(tokens, device=like.device)
    visible = (kept.position[:, None] <= queries[:, :, None] - window).expand(len(like), -1, -1)
    rotary = _turned_on(model, kept, position)
    first = 0 if lower else model.num_lower_attentions
    found = []
    for i, (past, held) in enumerate(zip(pasts, kept.lower if lower else kept.upper, strict=True)):
        turn = rotary[config.rope_of(first + i)]
        key = held.key if turn is None else rotate(held.key, turn)
        found.append(LongPast(past, Further(key, held.value, visible)))
    return tuple(found)


def _turned_on(model: Transformer, kept: Kept, position: int | Tensor) -> Rotary:
    """By what kept keys turn on, so that they seem no farther away than `kept_distance`: [B, 1, n, H/2]."""
    config, (B, n) = model.config, kept.position.shape
    begun = torch.as_tensor(position, device=kept.position.device).reshape(-1, 1)
    begun = begun - undecided(model, kept) + config.window_size - config.mini_batch_size  # where it was decided
    turns = (begun - (config.kept_distance or config.window_size) - kept.position).clamp(min=0)
    rotary = model.rotary(turns.flatten(), kept.surprise.new_empty(1, 1))
    return {kind: None if r is None else r.view(B, 1, n, r.shape[-1]) for kind, r in rotary.items()}
