"""Which architecture of Transformers a reader is without its fast MLPs, and what its config.json says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from longread.config import ModelConfig, UserError

_CONTEXT = 131_072
"""Of a model whose config does not say for how many tokens it was made: with windows there is no limit."""
_CLASSES = {
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GATES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


class Plain(NamedTuple):
    """A model of Transformers."""

    values: dict[str, Any]
    """Its config.json."""
    gain_offset: float = 0.0
    """Added to gains by the architecture."""
    embedding_factor: float = 1.0
    """On the embedding, and the next on the final norm: where the architecture scales the embedding by another factor
    and head and embedding are one."""
    final_factor: float = 1.0
    note: str = ""
    """How it differs otherwise."""


def plain_of(config: ModelConfig, provenance: Mapping[str, Any]) -> Plain:
    """The plain model that computes what a reader computes without fast MLPs.

    Raises:
        UserError: there is none in Transformers.
    """
    if config.mixer != "attention" or not config.pre_norm:
        what = f"mixer {config.mixer}" if config.mixer != "attention" else "no norms before its sub-layers"
        raise UserError(f"the model has {what}, which no Transformers model with windows has; convert another")
    config.check_nothing_kept("a plain model")
    kind = _architecture(config)
    context = int(provenance.get("context") or _CONTEXT)
    turned = [config.rope_of(block) for block in range(config.num_blocks)]
    windows, note = [config.window_of(block) for block in range(config.num_blocks)], ""
    if "local" in turned:
        opened = sum(window is not None and rope != "local" for window, rope in zip(windows, turned, strict=True))
        windows = [
            (window or context) if rope == "local" else None for window, rope in zip(windows, turned, strict=True)
        ]
        if opened:
            note = f"{opened} blocks see everything, since {kind} has windows only where angles are local, "
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise UserError(f"the model has windows of {sizes} tokens, and Transformers knows one size; convert another")
    values: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias and kind == "qwen3",
        "sliding_window": sizes[0] if sizes else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    layers = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if kind == "mistral":
        values["hidden_act"] = _GATES[config.gate]
    else:
        values |= {"layer_types": layers, "use_sliding_window": bool(sizes), "max_window_layers": 0}
        values["hidden_activation" if kind.startswith("gemma") else "hidden_act"] = _GATES[config.gate]
    if kind == "smollm3":
        values["no_rope_layers"] = [int(config.rope_of(block) != "none") for block in range(config.num_blocks)]
    values |= _rope(config, kind)
    if not kind.startswith("gemma"):
        return Plain(values, 0.0, *_scales(config, 1.0))
    values |= {
        "query_pre_attn_scalar": config.head_dim,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
    }
    return Plain(values, 1.0, *_scales(config, math.sqrt(config.width)), note)


def _scales(config: ModelConfig, scale: float) -> tuple[float, float]:
    """The factors on embedding and final norm that make up for an architecture's own scale of the embedding."""
    factor = config.embedding_scale / scale
    return (1.0, 1.0) if factor == 1 else (factor, 1 / factor if config.tie_embeddings else 1.0)


def _architecture(config: ModelConfig) -> str:
    """The simplest one that has everything."""
    turned = {config.rope_of(block) for block in range(config.num_blocks)}
    windows = {config.window_of(block) for block in range(config.num_blocks)}
    if config.post_norm:
        kind = "gemma3_text" if config.qk_norm else "gemma2"
    elif config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias:
        kind = "qwen2"
    else:
        kind = "smollm3" if len(windows) > 1 or "none" in turned else "mistral"
    lacking = {
        "biases of queries, keys and values": config.qkv_bias and kind not in ("qwen2", "qwen3"),
        "blocks without rotary embedding": "none" in turned and kind != "smollm3",
        "rotary embedding of another base in some blocks": "local" in turned and kind != "gemma3_text",
        "soft caps": bool(config.attention_soft_cap or config.logit_soft_cap) and not config.post_norm,
    }
    for what, lacks in lacking.items():
        if lacks:
            raise UserError(f"the model has {what}, which the {kind} model that it would be lacks; convert another")
    return kind


def _rope(config: ModelConfig, kind: str) -> dict[str, Any]:
    """As newer files say it, and as older versions of Transformers read it."""
    scaling = config.rope_scaling
    found: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        found = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            found["original_max_position_embeddings"] = scaling.original_context
        if scaling.kind == "llama3":
            found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            found["attention_factor"] = 1.0  # it is in the weights
    parameters: dict[str, Any] = found | {"rope_theta": config.rope_base}
    old: dict[str, Any] = {"rope_theta": config.rope_base, "rope_scaling": found if scaling is not None else None}
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.local_rope_base or config.rope_base}
        parameters = {"full_attention": parameters, "sliding_attention": local}
        old["rope_local_base_freq"] = local["rope_theta"]
    return old | {"rope_parameters": parameters}
