"""The config.json of a Transformers model as a network of ours.

Defaults are those that Transformers fills in where a file is silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longread.config import ModelConfig, UserError
from longread.pretrained.rope import rope_of

_QWEN = {"head_dim": None, "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False}
_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "smollm3": {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    "qwen2": _QWEN | {"max_position_embeddings": 32_768},
    "qwen3": _QWEN | {"max_position_embeddings": 32_768, "head_dim": 128},
    "gemma2": _GEMMA
    | {
        "max_position_embeddings": 8192,
        "vocab_size": 256_000,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": _GEMMA
    | {
        "max_position_embeddings": 131_072,
        "vocab_size": 262_208,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
}
"""Names of the architectures that can be converted ("model_type"), with what their files leave out."""

_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A pretrained network: fields of our config, and what has to be folded into its weights."""

    family: str
    fields: dict[str, Any]
    """Of `ModelConfig`: all but window, mini-batch, suffix and fast MLPs."""
    context: int
    """Tokens that the source was made for."""
    half_split: bool = True
    """Rotary pairs are (i, i + H/2) in its weights; ours are (2i, 2i + 1)."""
    gain_offset: float = 0.0
    """Added to every gain: Gemma's norms multiply by 1 + w."""
    query_factor: float = 1.0
    """On queries: our scores are divided by √H, Gemma's by √query_pre_attn_scalar."""
    rotary_factor: float = 1.0
    """On queries and on keys, wherever they are turned by scaled angles: yarn's attention factor."""

    def config(self, **others: Any) -> ModelConfig:
        """The network as a reader."""
        return ModelConfig(**self.fields, **others)


def network_of(values: Mapping[str, Any], where: object) -> Network:
    """The network that a config.json describes.

    Raises:
        UserError: Longread has no such architecture, or lacks something that this model has.
    """
    kind = values.get("model_type")
    if kind == "gemma3" and isinstance(values.get("text_config"), dict):
        values = {"quantization_config": values.get("quantization_config")} | values["text_config"]
        kind = "gemma3_text"
    if kind not in FAMILIES:
        raise UserError(
            f"{where} has the architecture {kind!r}; longread converts {', '.join(FAMILIES)} and gemma3's text model"
        )
    given = {name: value for name, value in values.items() if value is not None or name == "sliding_window"}
    facts = FAMILIES[kind] | given
    _refuse_unsupported(facts, where)
    rope = rope_of(facts, where)
    D, N, L = (_whole(facts, name, where) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    H = _whole(facts, "head_dim", where) if facts.get("head_dim") else D // N
    gemma = kind.startswith("gemma")
    layers = _layer_types(kind, facts, L, where)
    windows = tuple(int(facts["sliding_window"]) if layer == _SLIDING else 0 for layer in layers)
    turned = _block_rope(kind, facts, layers)
    kv_heads = int(facts.get("num_key_value_heads") or N)
    fields: dict[str, Any] = {
        "vocab_size": _whole(facts, "vocab_size", where),
        "width": D,
        "num_blocks": L,
        "num_heads": N,
        "mlp_hidden": _whole(facts, "intermediate_size", where),
        "rope_base": rope.base,
        "norm_eps": float(facts.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(facts.get("tie_word_embeddings", False)),
        "post_norm": gemma,
        "qk_norm": kind in ("qwen3", "gemma3_text"),
        "kv_heads": None if kv_heads == N else kv_heads,
        "head_size": None if H * N == D else H,
        "qkv_bias": kind == "qwen2" or bool(facts.get("attention_bias", False)),
        "gate": _gate(facts, where),
        "embedding_scale": math.sqrt(D) if gemma else 1.0,
        "rope_scaling": rope.scaling,
        "local_rope_base": rope.local_base if "local" in turned else None,
        "block_rope": turned if set(turned) != {"global"} else None,
        "block_windows": windows if any(windows) else None,
        "attention_soft_cap": facts.get("attn_logit_softcapping") if gemma else None,
        "logit_soft_cap": facts.get("final_logit_softcapping") if gemma else None,
    }
    return Network(
        family=kind,
        fields=fields,
        context=_whole(facts, "max_position_embeddings", where),
        gain_offset=1.0 if gemma else 0.0,
        query_factor=math.sqrt(H / facts["query_pre_attn_scalar"]) if gemma else 1.0,
        rotary_factor=rope.attention_factor,
    )


def _refuse_unsupported(facts: Mapping[str, Any], where: object) -> None:
    quantised = facts.get("quantization_config") or facts.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where} is quantised ({method}), which is not read; give the original weights, or a GGUF, "
            "which is dequantised"
        )
    for name, meaning in (
        ("mlp_bias", "biases in its MLPs"),
        ("use_bidirectional_attention", "attention in both directions"),
    ):
        if facts.get(name):
            raise UserError(f"{where} has {meaning} ({name}), which Longread's network lacks; give another model")


def _whole(facts: Mapping[str, Any], name: str, where: object) -> int:
    value = facts.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} says {name} {value!r}; it must be a whole number of at least 1")
    return value


def _gate(facts: Mapping[str, Any], where: object) -> str:
    name = facts.get("hidden_activation") or facts.get("hidden_act")
    if name is None:
        name = "gelu_pytorch_tanh" if "query_pre_attn_scalar" in facts else "silu"
    if name not in _GATES:
        raise UserError(f"{where} has the activation {name!r}; Longread's MLPs have {', '.join(_GATES)}")
    return _GATES[name]


def _layer_types(kind: str, facts: Mapping[str, Any], count: int, where: object) -> list[str]:
    """Of each block, whether its attention slides."""
    slides = facts.get("sliding_window") is not None
    if kind in ("qwen2", "qwen3", "smollm3"):
        slides = slides and bool(facts.get("use_sliding_window", False))
    if not slides or kind == "llama":
        return [_FULL] * count
    named = facts.get("layer_types") if kind != "mistral" else None
    if named is not None:
        if len(named) != count or not set(named) <= {_SLIDING, _FULL}:
            raise UserError(
                f"{where} has layer_types {sorted(set(named))} for {len(named)} of {count} blocks; there must be "
                f"one for each, {_SLIDING} or {_FULL}"
            )
        return list(named)
    if kind == "mistral":
        sliding = [True] * count
    elif kind == "smollm3":
        sliding = [not turned for turned in _turned(facts, count)]
    elif kind in ("gemma2", "gemma3_text"):
        period = int(facts.get("sliding_window_pattern", 2))
        sliding = [(i + 1) % period != 0 for i in range(count)]
    else:
        sliding = [i >= facts["max_window_layers"] for i in range(count)]
    return [_SLIDING if one else _FULL for one in sliding]


def _block_rope(kind: str, facts: Mapping[str, Any], layers: list[str]) -> tuple[str, ...]:
    if kind == "smollm3":
        return tuple("global" if turned else "none" for turned in _turned(facts, len(layers)))
    if kind == "gemma3_text":
        return tuple("local" if layer == _SLIDING else "global" for layer in layers)
    return ("global",) * len(layers)


def _turned(facts: Mapping[str, Any], count: int) -> list[bool]:
    """SmolLM 3: which blocks have rotary embeddings."""
    named = facts.get("no_rope_layers")
    if named:
        return [bool(one) for one in named[:count]]
    return [(i + 1) % facts["no_rope_layer_interval"] != 0 for i in range(count)]
