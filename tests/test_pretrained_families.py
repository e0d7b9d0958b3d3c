"""config.json of published models, as older and newer versions of Transformers write it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longread.model.undrawn import _Undrawn
from longread.pretrained.families import network_of

LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_SCALING,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen2.5, stretched": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 131072,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "no_rope_layer_interval": 4,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "gemma-3-4b, which says little": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    """The same network from the file as it is and as Transformers writes it today; as large as Transformers' own."""
    values = PUBLISHED[name]
    network = network_of(values, name)
    theirs = AutoConfig.for_model(**values)
    again = network_of(theirs.to_dict(), name)
    assert dataclasses.asdict(again) == dataclasses.asdict(network)
    with torch.device("meta"), _Undrawn():
        model = AutoModelForCausalLM.from_config(theirs)
    config = network.config(window_size=512, mini_batch_size=256)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.embedding_scale == pytest.approx(getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0))


def test_what_they_say() -> None:
    found = {name: network_of(values, name) for name, values in PUBLISHED.items()}
    fields = {name: network.fields for name, network in found.items()}
    assert found["Llama-3.2-1B"].context == 131072
    scaling = fields["Llama-3.2-1B"]["rope_scaling"]
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", 32.0, 8192)
    assert fields["Mistral-7B-v0.1"]["block_windows"] == (4096,) * 32
    assert fields["Qwen2.5-0.5B"]["block_windows"] is None
    assert found["Qwen2.5, stretched"].rotary_factor == pytest.approx(1.1386294)
    assert fields["SmolLM3-3B"]["block_rope"] == ("global", "global", "global", "none") * 9
    assert fields["gemma-3-1b"]["block_windows"][:7] == (512, 512, 512, 512, 512, 0, 512)
    assert fields["gemma-3-1b"]["block_rope"][:7] == ("local",) * 5 + ("global", "local")
    assert (fields["gemma-3-1b"]["rope_base"], fields["gemma-3-1b"]["local_rope_base"]) == (1e6, 1e4)
    four = fields["gemma-3-4b, which says little"]
    assert (four["rope_scaling"].kind, four["rope_scaling"].factor, four["num_heads"]) == ("linear", 8.0, 8)
    assert fields["gemma-2-2b"]["block_windows"][:4] == (4096, 0, 4096, 0)
    assert (fields["gemma-2-2b"]["attention_soft_cap"], fields["gemma-2-2b"]["logit_soft_cap"]) == (50.0, 30.0)
