"""The metadata of a GGUF file as the config.json that the same model has for Transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from longread.config import UserError
from longread.pretrained.families import Network, network_of
from longread.pretrained.gguf_source import ROTARY_FACTORS, GGUFSource

_KINDS = {
    "llama": "llama",  # Mistral too
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_INTERLEAVED = ("llama", "smollm3")
"""Architectures whose rotary pairs llama.cpp keeps as (2i, 2i + 1); it writes those of all others half-split."""
_NAMES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1, 3.2 and 3.3; a GGUF has only the factors that come of them."""
_GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3": 62}
"""Gemma 27B divides scores by √(D / N) instead of √H; a GGUF does not say so."""


def network_in(source: GGUFSource) -> Network:
    """The network in a GGUF file.

    Raises:
        UserError: Longread has no such architecture, or the metadata do not describe it.
    """
    said, where = source.metadata, source.where
    kind = said.get("general.architecture")
    if kind not in _KINDS:
        raise UserError(f"{where} has the architecture {kind!r}; longread converts GGUF of {', '.join(_KINDS)}")
    values = {theirs: said[f"{kind}.{name}"] for theirs, name in _NAMES.items() if f"{kind}.{name}" in said}
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{where} lacks token_embd.weight; give a GGUF of a whole text model")
    for name, value in values.items():
        if isinstance(value, float):  # a float32, and meant as the decimal that it rounds
            values[name] = float(str(np.float32(value)))
        if isinstance(value, list):  # one for each block
            if len(set(value)) != 1:
                raise UserError(f"{where} has {name} that differs from block to block, which Longread's network lacks")
            values[name] = value[0]
    values |= {
        "model_type": _KINDS[kind],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "rope_scaling": _scaling(kind, said, source),
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
    }
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if kind in ("llama", "smollm3", "qwen2", "qwen3"):
        values["sliding_window"] = None  # llama.cpp looks at everything there
    if kind in _GEMMA_27B_BLOCKS:
        whole = values["num_hidden_layers"] == _GEMMA_27B_BLOCKS[kind]
        values["query_pre_attn_scalar"] = (
            values["hidden_size"] / values["num_attention_heads"] if whole else values["head_dim"]
        )
        values["sliding_window_pattern"] = 2 if kind == "gemma2" else 6
    turned = said.get(f"{kind}.rope.dimension_count", values["head_dim"])
    values["partial_rotary_factor"] = turned / values["head_dim"]
    network = network_of(values, where)
    return dataclasses.replace(network, half_split=kind not in _INTERLEAVED, gain_offset=0.0)  # Gemma's are 1 + w here


def _scaling(kind: str, said: Mapping[str, Any], source: GGUFSource) -> dict[str, Any] | None:
    if ROTARY_FACTORS in source.tensors:
        return _from_factors(source)
    name = said.get(f"{kind}.rope.scaling.type", "none")
    if name == "none":
        return None
    found: dict[str, Any] = {"rope_type": name, "factor": said.get(f"{kind}.rope.scaling.factor", 1.0)}
    for theirs, ours in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if f"{kind}.rope.scaling.{theirs}" in said:
            found[ours] = said[f"{kind}.rope.scaling.{theirs}"]
    own = said.get(f"{kind}.rope.scaling.attn_factor")
    if own is not None and name == "yarn":  # on top of yarn's
        found["attention_factor"] = own * (0.1 * math.log(found["factor"]) + 1.0)
    return found


def _from_factors(source: GGUFSource) -> dict[str, Any]:
    """The scaling of Llama 3 by which angles are divided as a GGUF says. Raises `UserError` if it is another one."""
    factors = source.read(ROTARY_FACTORS).double()
    base = float(source.metadata["llama.rope.freq_base"])
    wavelengths = 2 * math.pi * base ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    factor = round(float(factors.max()), 4)
    low, high, original = _LLAMA3.values()
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
        raise UserError(f"{source.where} has rotary factors of its own, which Longread's network lacks")
    return {"rope_type": "llama3", "factor": factor} | _LLAMA3
