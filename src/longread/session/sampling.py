"""From logits to tokens, for whoever writes: penalty, temperature, top-k, top-p, the draw.

A row is drawn as it is alone, whatever the others are: a seed gives one text in a session, an engine and an evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.config import UserError
from longread.ops.likeliest import likeliest

Recent = Sequence[Sequence[int]] | Tensor
"""Of each row the tokens that a penalty is about, in any order: token ids, or int64 [B, n]."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a text.

    Raises:
        UserError: a setting is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draws from the smallest set of likeliest tokens that holds this much probability."""
    top_k: int | None = None
    """Draws from this many of the likeliest; None: from all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the last window (arXiv 1909.05858)."""
    seed: int | None = None
    """Makes the draw repeatable, whatever else is drawn beside it; None: another text each time."""
    stop_ids: Collection[int] = frozenset()
    """Ends before one of these, which is neither given nor read."""
    logprobs: int = 0
    """How many of the likeliest tokens to report beside each token."""

    @property
    def takes_likeliest(self) -> bool:
        """Whether all it asks for is what the model itself finds likeliest."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.logprobs

    def __post_init__(self) -> None:  # comparisons are written so that NaN is refused
        if self.max_tokens < 0:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 0")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 changes nothing"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; it must fit into 64 bits")
        if self.logprobs < 0:
            raise UserError(f"logprobs is {self.logprobs}; it must be at least 0")


class Drawn(NamedTuple):
    """One token, its log-probability before temperature and penalties, and the likeliest with theirs."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


def seeded(seed: int | None, device: torch.device) -> torch.Generator:
    """A generator that repeats itself for a seed, and never without one."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:  # of a seed PyTorch's generator on the CPU takes the lowest 32 bits only
        generator.manual_seed(seed if device.type != "cpu" or 0 <= seed < 2**32 else _hashed(seed, bits=32))
    return generator


def derived_seed(seed: int, index: int) -> int:
    """A seed for the `index`-th of several draws that share one: itself for the first, a hash of both for the others.

    A sum would give draw 1 of seed 7 what draw 0 of seed 8 has.
    """
    return _hashed(seed, index, bits=63) if index else seed


def _hashed(*numbers: int, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()) >> (256 - bits)


@torch.no_grad()
def choose(
    logits: Tensor, settings: Sequence[Sampling], recent: Recent, generators: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each row, int64 [B], from logits [B, V].

    A race of exponential variables decides, as in `torch.multinomial`. Where all rows have the same settings and
    `recent` is a tensor, a GPU is not waited for.
    """
    logits = _penalised(logits, settings, recent)
    ids = logits.argmax(-1)
    racing = [i for i, s in enumerate(settings) if s.temperature > 0]
    if not racing:
        return ids
    p, ranked, kept = _weights(logits[racing] if len(racing) < len(settings) else logits, [settings[i] for i in racing])
    race = torch.ones_like(p)
    for row, count, i in zip(race, kept, racing, strict=True):
        row[:count].exponential_(generator=generators[i])
    drawn = ranked.gather(-1, (p / race).argmax(-1, keepdim=True)).squeeze(-1)
    if len(racing) == len(settings):
        return drawn
    ids[racing] = drawn
    return ids


@torch.no_grad()
def draw(
    logits: Tensor, settings: Sequence[Sampling], recent: Recent, generators: Sequence[torch.Generator]
) -> list[Drawn]:
    """What `choose` chooses, with the log-probabilities that are asked for."""
    plain = [s.takes_likeliest for s in settings]
    if all(plain):
        found = _on_host(*(x.unsqueeze(-1) for x in likeliest(logits)))
        return [Drawn(token_id, p, []) for (token_id,), (p,) in zip(*found, strict=True)]
    ids = choose(logits, settings, recent, generators).unsqueeze(-1)
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, ids)
    if any(plain):  # their last bits are what they are without the others
        own = torch.where(torch.tensor(plain, device=own.device).unsqueeze(-1), likeliest(logits)[1].unsqueeze(-1), own)
    most = min(max(s.logprobs for s in settings), logits.shape[-1])
    values, ranked = log_p.topk(most, dim=-1) if most else (log_p[:, :0], ids[:, :0])
    found = _on_host(ids, own, ranked, values)
    return [
        Drawn(token_id, p, list(zip(top_ids[: s.logprobs], top[: s.logprobs], strict=True)))
        for (token_id,), (p,), top_ids, top, s in zip(*found, settings, strict=True)
    ]


def _on_host(*rows: Tensor) -> list[list[list[Any]]]:
    """The numbers of several tensors [B, n] of any types; a GPU is waited for once."""
    flat = [x.reshape(-1).view(torch.uint8) for x in rows]
    parts = torch.cat(flat).cpu().split([len(x) for x in flat])
    return [part.clone().view(x.dtype).view(x.shape).tolist() for part, x in zip(parts, rows, strict=True)]


def probabilities(logits: Tensor, sampling: Sampling, recent: Recent) -> Tensor:
    """The distributions that `choose` draws from, [B, V] from logits [B, V], each with the sum 1."""
    settings = [sampling] * len(logits)
    logits = _penalised(logits, settings, recent)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    p, ids, _ = _weights(logits, settings)
    return torch.zeros_like(logits).scatter_(-1, ids, p / p.sum(-1, keepdim=True))


def _penalised(logits: Tensor, settings: Sequence[Sampling], recent: Recent) -> Tensor:
    """Logits of recent tokens divided by the penalty, or multiplied where they are negative."""
    rows = [i for i, s in enumerate(settings) if s.repetition_penalty != 1 and len(recent[i])]
    if not rows:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for i in rows:
        of = recent[i]
        seen[i].index_fill_(0, of if isinstance(of, Tensor) else torch.tensor(list(of), device=logits.device), True)
    penalty = _column([s.repetition_penalty for s in settings], logits)
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).nan_to_num()
    return torch.where(seen, changed, logits)


def _weights(logits: Tensor, settings: Sequence[Sampling]) -> tuple[Tensor, Tensor, list[int]]:
    """At temperatures above 0: weights of the tokens, likeliest first and 0 where they cannot be drawn; their ids, both
    [B, V]; and how many of the first a top-k leaves.
    """
    V = logits.shape[-1]
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    # differences, and no smaller divisor: a temperature next to 0 then takes the likeliest instead of overflowing
    weights = (values - values[:, :1]) / _column([s.temperature for s in settings], values)
    kept = [min(s.top_k or V, V) for s in settings]
    if min(kept) < V:
        places = torch.arange(V, device=values.device)
        weights = weights.masked_fill(places >= torch.tensor(kept, device=values.device).unsqueeze(1), -torch.inf)
    p = weights.softmax(-1)
    if any(s.top_p < 1 for s in settings):
        share = _column([s.top_p for s in settings], p)
        inside = (p.cumsum(-1) - p < share) | (share >= 1)  # the token that crosses the line is kept
        p = torch.where(inside, p, 0.0)
    return p, ids, kept


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """A setting of each row, [B, 1], of the type of `like` and within its range; equal ones are not copied to a GPU."""
    limits = torch.finfo(like.dtype)
    within = [min(max(value, limits.tiny), limits.max) for value in values]
    if len(set(within)) == 1:
        return like.new_full((len(within), 1), within[0])
    return like.new_tensor(within).unsqueeze(1)
