"""GGUF files of tiny models, laid out as llama.cpp's converter lays them out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
BYTES = [chr(b) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF else None for b in range(256)]


def byte_tokens() -> list[str]:
    """One token a byte, spelled as byte-level tokenizers spell them."""
    spelled, extra = [], 0
    for character in BYTES:
        spelled.append(character or chr(256 + extra))
        extra += character is None
    return spelled


def write(model: PreTrainedModel, path: Path, said: dict[str, Any], *, kind: str | None = None) -> dict[str, Tensor]:
    """Writes the model with these metadata, and gives its weights as they come out of the file, in their old places.

    Args:
        kind: how matrices are quantised, "Q8_0" for instance; None: not at all.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (_metadata(model, architecture) | said).items():
        _add(writer, name, value)
    read: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs, turned = _theirs(name, post_norm="gemma" in config.model_type), tensor
        if "norm" in name and "gemma" in config.model_type:
            turned = turned + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and part in heads:
            turned = _paired(turned, heads[part])
        numbers = turned.numpy()
        if kind is not None and tensor.dim() == 2:
            quantised = getattr(gguf.GGMLQuantizationType, kind)
            stored = gguf.quants.quantize(numbers, quantised)
            writer.add_tensor(theirs, stored, raw_dtype=quantised)
            numbers = gguf.quants.dequantize(stored, quantised)
            out = torch.from_numpy(numbers.copy())
            read[name] = _split(out, heads[part]) if turned is not tensor else out
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(numbers))
            read[name] = tensor
    if architecture == "llama" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _metadata(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config, rope = model.config, model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    values = {
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if "gemma" in config.model_type:
        values["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _theirs(name: str, *, post_norm: bool) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, block, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    names = NAMES | {"post_attention_layernorm": "post_attention_norm" if post_norm else "ffn_norm"}
    return f"blk.{block}.{names[part]}.{kind}"


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads with the two halves of each interleaved."""
    first, second = rows.reshape(heads, 2, -1, *rows.shape[1:]).unbind(1)
    return torch.stack([first, second], dim=2).reshape(rows.shape)


def _split(rows: Tensor, heads: int) -> Tensor:
    even, odd = rows.reshape(heads, -1, 2, *rows.shape[1:]).unbind(2)
    return torch.stack([even, odd], dim=1).reshape(rows.shape)


def _factors(config: Any) -> np.ndarray:
    """By which the angles of Llama 3 are divided."""
    rope, H = config.rope_parameters, config.head_dim
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(H // 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (2 * i / H))
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
