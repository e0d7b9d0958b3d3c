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

from longread.config import InnerConfig
from longread.inner_loop import Decoder, ReadingState, begin, read
from longread.model import Transformer
from longread.session.sampling import Sampling, choose, seeded

LOOK_EVERY = 16
"""Tokens between two looks at whether all that is wanted has been written."""


class BatchContinuation(NamedTuple):
    """The continuations of B sequences."""

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
    sampling: Sampling,
    *,
    learn: bool,
    seeds: Sequence[int | None] = (),
    forbidden: Sequence[int] = (),
    probe: Tensor | None = None,
    enough: Callable[[Tensor], bool] | None = None,
    state: ReadingState | None = None,
) -> BatchContinuation:
    """Reads a prompt into each sequence, then writes and reads (and, if `learn`, learns from) what `sampling` asks for.

    Args:
        prompts: int64 [B, n], n >= 1, on any device.
        sampling: of all of them; its `stop_ids` and `logprobs` are not looked at.
        seeds: one per sequence, instead of `sampling.seed`; a sequence's draws depend on nothing else.
        forbidden: ids that are never written.
        probe: int64 [B, p], p >= 1, scored after the prompt as if these tokens came next, and forgotten again.
        enough: given what was written so far [B, m], says from time to time whether to stop early.
        state: what comes before the prompts, already read; None: nothing.
    """
    state = begin(model, len(prompts)) if state is None else state
    reading = read(model, state, prompts.to(model.device), inner=inner, learn=learn)
    probed = None
    if probe is not None:
        probed = read(model, reading.state, probe.to(model.device), inner=inner, learn=False).nll.cpu()
    decoder = Decoder(model, reading.state, inner, learn=learn)
    settings, max_tokens = [sampling] * len(prompts), sampling.max_tokens
    generators = [seeded(seed, model.device) for seed in seeds or [sampling.seed] * len(prompts)]
    recent = prompts.to(model.device)[:, -model.config.window_size :]
    banned = torch.tensor(list(forbidden), dtype=torch.long, device=model.device)
    written: list[Tensor] = []
    sound = torch.ones(len(prompts), max_tokens, dtype=torch.bool, device=model.device)
    for step in range(max_tokens):
        logits = decoder.logits()
        sound[:, step] = logits.isfinite().all(1)
        logits = logits.nan_to_num().index_fill(1, banned, -math.inf)
        token = choose(logits, settings, recent, generators)
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
    return BatchContinuation(tokens.cpu(), [None if i is None else reading.state.position + i for i in first], probed)
