"""What reading and writing launch on a GPU, on tensors without memory (`longread.ops.precompile`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from longread.config import InnerConfig, ModelConfig
from longread.inner_loop.decoding import Decoder
from longread.inner_loop.optimizers import optimizer_named
from longread.inner_loop.reading import STRETCH, begin, read
from longread.inner_loop.step import inner_gradient, matrices, step_norm_limit
from longread.model import Transformer, undrawn
from longread.ops.precompile import precompile

_WHOLE = 3
"""Mini-batches of the text that is read in all, so that windows have been empty and full."""
_FEW_BLOCKS = 2
"""Of prefix and of suffix, where all are alike: they launch the same kernels."""


def precompile_reading(model: Transformer, inner: InnerConfig, *, learn: bool = True) -> None:
    """Begins to compile what sessions of `model` launch on a GPU; one that does not learn launches less."""
    gain = next((p for p in model.parameters() if p.dim() == 1), model.embedding.weight)
    dtypes = [str(p.dtype).removeprefix("torch.") for p in (model.embedding.weight, gain)]
    precompile(rehearse_reading, model.config.as_dict(), inner.as_dict(), dtypes, learn, device=model.device)


def rehearse_reading(
    model_config: dict[str, Any], inner_config: dict[str, Any], dtypes: list[str], learn: bool
) -> None:
    """Reads a text from the beginning and in pieces, reads as a graph does, and writes some tokens.

    Args:
        model_config, inner_config: as `as_dict` gives them.
        dtypes: of the matrices and of the gains, as PyTorch calls them.
        learn: whether it learns as it reads.
    """
    config, inner = few_blocks(ModelConfig.from_dict(model_config)), InnerConfig.from_dict(inner_config)
    if config.mixer != "attention":
        return
    model = undrawn(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtypes[parameter.dim() == 1]))
    window = max(config.window_of(i) or 0 for i in range(config.num_blocks))
    text = torch.zeros(1, window + _WHOLE * config.mini_batch_size + 1, dtype=torch.long, device="meta")
    state = begin(model)
    with torch.no_grad():
        for part in (text, text[:, 1:], text[:, :7]):
            state = read(model, state, part, inner=inner, learn=learn, guard=True).state
        if learn and config.num_suffix_blocks:
            _rehearse_captured(model, inner)
        writer = Decoder(model, state, inner, learn=learn)
        for _ in range(2):
            writer.logits()
            writer.read(text[:, 0])


def few_blocks(config: ModelConfig) -> ModelConfig:
    """The config with fewer blocks, where none of them is one of its kind."""
    if config.attention == "hybrid" or config.block_rope or config.block_windows:
        return config
    suffix = min(config.num_suffix_blocks, _FEW_BLOCKS)
    prefix = min(config.num_prefix_blocks, _FEW_BLOCKS)
    return dataclasses.replace(config, num_blocks=prefix + suffix, num_suffix_blocks=suffix)


def _rehearse_captured(model: Transformer, inner: InnerConfig) -> None:
    """A mini-batch as `captured.py` reads it: weights are changed in place, and cast once."""
    M, state = model.config.mini_batch_size, begin(model)
    tokens = torch.zeros(1, max(STRETCH, M), dtype=torch.long, device="meta")
    start = torch.zeros(1, dtype=torch.float64, device="meta")
    hidden, _ = model.lower(tokens, state.lower_pasts, start=start)
    fast = [torch.empty_like(w) for w in matrices(state.fast)]
    working = [w.to(model.dtype).requires_grad_() for w in fast]
    mask = torch.ones(1, M, dtype=torch.bool, device="meta")
    found = inner_gradient(model, working, state.upper_pasts, hidden[:, :M], tokens[:, :M], mask, start=start, order=0)
    limit = step_norm_limit(model)
    working = [w.detach() for w in working]
    step = optimizer_named(inner.optimizer).step_
    step(fast, found.gradients, working, lr=inner.lr, clip=inner.clip, max_step_norm=limit)
