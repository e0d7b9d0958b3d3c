"""Many texts read and continued side by side: greedily, or drawn as decoding quality is judged.

`Session.generate` continues one text. Evaluations continue many of equal length at once, because a token of one
sequence costs a GPU nearly as much as a token of each of many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig, UserError
from longread.inner_loop import Decoder, begin, read
from longread.model import Transformer
from longread.session.sampling import seeded

LOOK_EVERY = 16
"""Tokens between two looks at whether all that is wanted has been written."""


class Sampling(NamedTuple):
    """How the next token is chosen; the defaults are those of the paper's decoding figure."""

    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    """Of the tokens among the last window, as in `Session.generate`."""

    def check(self) -> None:
        """Raises `UserError` for the first value out of range, NaN included."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")


GREEDY = Sampling(0.0, 1.0, 1.0)


class BatchContinuation(NamedTuple):
    """What B sequences were continued with."""

    tokens: Tensor
    """int64 [B, m]"""
    diverged_at: list[int | None]
    """Tokens read when a sequence's logits were first not finite; what it says from there on is arbitrary."""
    probe_nll: Tensor | None
    """Of the probe, [B, p]."""


@torch.no_grad()
def continue_texts(
    model: Transformer,
    inner: InnerConfig,
    prompts: Tensor,
    max_tokens: int,
    *,
    learn: bool,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    probe: Tensor | None = None,
    enough: Callable[[Tensor], bool] | None = None,
) -> BatchContinuation:
    """Reads a prompt into each sequence, then writes and reads (and, if `learn`, learns from) `max_tokens` more.

    Args:
        prompts: int64 [B, n], n >= 1, on any device.
        seeds: one per sequence, needed unless the temperature is 0; a sequence's draws depend on nothing else.
        forbidden: ids that are never written.
        probe: int64 [B, p], p >= 1, scored after the prompt as if these tokens came next, and forgotten again.
        enough: given what was written so far [B, m], says from time to time whether to stop early.
    """
    sampling.check()
    reading = read(model, begin(model, len(prompts)), prompts.to(model.device), inner=inner, learn=learn)
    probed = None
    if probe is not None:
        probed = read(model, reading.state, probe.to(model.device), inner=inner, learn=False).nll.cpu()
    decoder = Decoder(model, reading.state, inner, learn=learn)
    draws = _uniform(seeds, max_tokens).to(model.device) if sampling.temperature else None
    recent = prompts.to(model.device)[:, -model.config.window_size :]
    banned = torch.tensor(list(forbidden), dtype=torch.long, device=model.device)
    written: list[Tensor] = []
    sound = torch.ones(len(prompts), max_tokens, dtype=torch.bool, device=model.device)
    for step in range(max_tokens):
        logits = decoder.logits()
        sound[:, step] = logits.isfinite().all(1)
        logits = logits.nan_to_num().index_fill(1, banned, -math.inf)
        if sampling.repetition_penalty != 1.0:
            logits = _penalised(logits, recent, sampling.repetition_penalty)
        token = _chosen(logits, sampling, None if draws is None else draws[:, step])
        written.append(token)
        if sampling.repetition_penalty != 1.0:
            recent = torch.cat((recent, token[:, None]), 1)[:, -model.config.window_size :]
        if enough and len(written) % LOOK_EVERY == 0 and enough(torch.stack(written, 1)):
            break
        if len(written) < max_tokens:
            decoder.read(token)
    decoder.rest()
    tokens = torch.stack(written, 1) if written else prompts.new_empty(len(prompts), 0)
    first = [next((i for i, fine in enumerate(row) if not fine), None) for row in sound[:, : len(written)].tolist()]
    return BatchContinuation(tokens.cpu(), [None if i is None else prompts.shape[1] + i for i in first], probed)


def _uniform(seeds: Sequence[int], count: int) -> Tensor:
    """[B, count] from [0, 1): each row from its own generator, so that it does not depend on its neighbours."""
    rows = [torch.rand(count, generator=seeded(seed, torch.device("cpu")), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def _penalised(logits: Tensor, recent: Tensor, penalty: float) -> Tensor:
    """arXiv 1909.05858: positive logits of recent tokens divided, negative ones multiplied; [B, V]."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, recent, True)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _chosen(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """int64 [B]: the likeliest token, or the one at `uniform` of the nucleus's cumulated probability."""
    if uniform is None:
        return logits.argmax(-1)
    values, ids = logits.double().sort(descending=True, stable=True)
    p = ((values - values[:, :1]) / max(sampling.temperature, torch.finfo(values.dtype).tiny)).softmax(-1)
    p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)  # the token that crosses the line is kept
    reached = p.cumsum(-1)
    place = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, place.clamp(max=ids.shape[1] - 1)).squeeze(1)
