"""The next token of many texts at once, each with settings and a generator of its own.

A token is drawn as `Session.generate` draws it, by a race of exponential variables (`torch.multinomial` for one
sample), so that an engine and a session write the same text from the same seed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.engine.interface import Sampling, TopTokens


class Drawn(NamedTuple):
    """One token, how likely it was, and what was likeliest."""

    id: int
    logprob: float
    top: TopTokens


@torch.no_grad()
def draw(
    logits: Tensor,
    settings: Sequence[Sampling],
    recent: Sequence[Collection[int]],
    generators: Sequence[torch.Generator],
) -> list[Drawn]:
    """One token for each row of logits [B, V]."""
    changed = logits
    penalised = [i for i, s in enumerate(settings) if s.repetition_penalty != 1.0 and recent[i]]
    if penalised:
        changed = logits.clone()
        for i in penalised:
            _penalise(changed[i], recent[i], settings[i].repetition_penalty)
    ids = changed.argmax(-1)
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    if drawn:
        rows = changed if len(drawn) == len(settings) else changed[drawn]
        ids[drawn] = _race(rows, [settings[i] for i in drawn], [generators[i] for i in drawn])
    log_sum = logits.logsumexp(-1, keepdim=True)
    log_p = (logits.gather(-1, ids.unsqueeze(-1)) - log_sum).squeeze(-1)
    most = min(max(s.logprobs for s in settings), logits.shape[-1])
    top_values, top_ids = (logits - log_sum).topk(most, dim=-1)
    found = zip(ids.tolist(), log_p.tolist(), top_values.tolist(), top_ids.tolist(), settings, strict=True)
    return [
        Drawn(token_id, p, list(zip(ranked[: s.logprobs], values[: s.logprobs], strict=True)))
        for token_id, p, values, ranked, s in found
    ]


def _penalise(logits: Tensor, recent: Collection[int], penalty: float) -> None:
    ids = torch.tensor(sorted(set(recent)), device=logits.device)
    chosen = logits[ids]
    logits[ids] = torch.where(chosen > 0, chosen / penalty, chosen * penalty).nan_to_num()


def _race(logits: Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """Ids [B], drawn at temperatures above 0."""
    V = logits.shape[-1]
    values, ids = logits.sort(descending=True, stable=True)
    # differences, and no smaller divisor: a temperature next to 0 then takes the likeliest instead of overflowing
    tiny = torch.finfo(values.dtype).tiny
    temperature = values.new_tensor([max(s.temperature, tiny) for s in settings]).unsqueeze(1)
    weights = (values - values[:, :1]) / temperature
    kept = [min(s.top_k or V, V) for s in settings]
    if min(kept) < V:
        places = torch.arange(V, device=values.device)
        weights = weights.masked_fill(places >= torch.tensor(kept, device=values.device).unsqueeze(1), -torch.inf)
    p = weights.softmax(-1)
    if any(s.top_p < 1 for s in settings):
        share = p.new_tensor([s.top_p for s in settings]).unsqueeze(1)
        inside = (p.cumsum(-1) - p < share) | (share >= 1)  # the token that crosses the line is kept
        p = torch.where(inside, p, 0.0)
    race = torch.ones_like(p)
    for row, count, generator in zip(race, kept, generators, strict=True):
        row[:count].exponential_(1, generator=generator)
    return ids.gather(-1, (p / race).argmax(-1, keepdim=True)).squeeze(-1)
