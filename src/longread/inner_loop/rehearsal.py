"""What reading and writing launch on a GPU, on tensors without memory (`longread.ops.precompile`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from longread.config import InnerConfig, ModelConfig
from longread.inner_loop.captured import CapturedReader
from longread.inner_loop.decoding import Decoder
from longread.inner_loop.reading import GPU_STRETCH, read
from longread.inner_loop.state import ReadingState, begin
from longread.model import Past, Transformer, undrawn
from longread.ops.precompile import precompile

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
    """Reads as a graph does, reads pieces as they are left over, and writes some tokens.

    Args:
        model_config, inner_config: as `as_dict` gives them.
        dtypes: of the matrices and of the gains, as PyTorch calls them.
        learn: whether it learns as it reads.
    """
    config, inner = few_blocks(ModelConfig.from_dict(model_config)), InnerConfig.from_dict(inner_config)
    if not config.decodes_in_place:
        return
    model = undrawn(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtypes[parameter.dim() == 1]))
    tokens = torch.zeros(1, max(GPU_STRETCH, config.mini_batch_size) + 2, dtype=torch.long, device="meta")
    with torch.no_grad():
        state = begin(model)
        later = _after_a_window(model, state)
        if learn and config.num_suffix_blocks and config.attention == "window":
            reader = CapturedReader(model, 1, inner, guard=True)
            reader.rehearse(state)
            reader.rehearse(later)
            tokens = tokens[:, : config.mini_batch_size + 2]
        else:
            read(model, state, tokens, inner=inner, learn=learn, guard=True)
        state = read(model, later, tokens, inner=inner, learn=learn, guard=True).state
        state = read(model, state, tokens[:, :1], inner=inner, learn=learn, guard=True).state
        writer = Decoder(model, state, inner, learn=learn)
        for _ in range(2):
            writer.logits()
            writer.read(tokens[:, 0])


def _after_a_window(model: Transformer, state: ReadingState) -> ReadingState:
    """A state whose windows are full."""
    config, split = model.config, model.num_lower_attentions
    pasts = [
        Past(*(x.new_zeros(*x.shape[:2], config.window_of(i) or config.window_size, x.shape[3]) for x in past))
        for i, past in enumerate((*state.lower_pasts, *state.upper_pasts))
    ]
    output = state.hidden.new_zeros(1, config.width)
    position = max(past.key.shape[2] for past in pasts)
    lower, upper = tuple(pasts[:split]), tuple(pasts[split:])
    return dataclasses.replace(state, position=position, lower_pasts=lower, upper_pasts=upper, output=output)


def few_blocks(config: ModelConfig) -> ModelConfig:
    """The config with fewer blocks, where none of them is one of its kind."""
    if config.attention == "hybrid" or config.block_rope or config.block_windows:
        return config
    suffix = min(config.num_suffix_blocks, _FEW_BLOCKS)
    prefix = min(config.num_prefix_blocks, _FEW_BLOCKS)
    return dataclasses.replace(config, num_blocks=prefix + suffix, num_suffix_blocks=suffix)
