"""Tiny random models of Transformers, with a tokenizer, as directories that `longread convert` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longread.cli import main
from longread.inner_loop import begin, read
from longread.loading import OpenModel, open_model

V = 96
TOKENS = 40
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 6}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, one head of keys": ("llama", {"num_key_value_heads": 1}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral, windows": ("mistral", {"sliding_window": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
    "smollm3, windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2}),
    "smollm3, yarn": ("smollm3", {"no_rope_layers": [1, 1, 0, 1], "rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2, some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN | {"attention_factor": 1.3}}),
    "qwen3, biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA | {"sliding_window": 8, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window": 8, "tie_word_embeddings": True}),
    "gemma3, linear, one period": (
        "gemma3_text",
        GEMMA
        | {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}


def make(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model of one architecture, in float32; its gains and biases are drawn too, and its matrices are large
    enough for every sub-layer to matter. A bias behind attention is 0: Longread has no place for another."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else parameter.shape[1] ** -0.5))
    return model


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """The model and a tokenizer of its vocabulary, as `save_pretrained` writes it."""
    model.save_pretrained(directory, **options)
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def tokenizer(tokens: int = V) -> tokenizers.Tokenizer:
    """One token a character, from the space on."""
    words = {chr(32 + i): i for i in range(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    return made


def convert(source: str | Path, destination: Path, *options: str) -> int:
    return main(["convert", str(source), str(destination), *options])


def converted(source: str | Path, destination: Path, *options: str) -> OpenModel:
    """The reader that a source becomes."""
    assert convert(source, destination, *options) == 0
    return open_model(destination, "cpu")


def a_text(tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(opened: OpenModel, ids: Tensor, *, learning: bool = False) -> Tensor:
    """What a reader gives at every position for the tokens that it has, [1, T, V], with W_0 shared, or as each
    sequence's own."""
    model = opened.model
    lower, upper = model.empty_pasts(1)
    hidden, _ = model.lower(ids, lower, start=0)
    fast = model.initial_fast_weights(1) if learning else None
    logits = model.logits(model.upper(hidden, fast, upper, start=0, order=0)[0])
    return logits[..., : opened.tokenizer.vocab_size]


@torch.no_grad()
def wanted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What Transformers gives, [1, T, V]."""
    return model(ids).logits.float()


def check_equal(got: Tensor, want: Tensor) -> None:
    """The promise of a conversion: logits equal to 1e-5 of the largest, for the tokens that both are of."""
    V = min(got.shape[-1], want.shape[-1])
    got, want = got[..., :V], want[..., :V]
    error, largest = (got - want).abs().max().item(), want.abs().max().item()
    assert largest > 1, "the model gives the same for all tokens: nothing is tested"
    assert error <= 1e-5 * largest, f"logits differ by {error:.2e}, of {largest:.2f}"


@torch.no_grad()
def losses_of(opened: OpenModel, ids: Tensor, *, learn: bool) -> Tensor:
    """−log p of each token but the first, as a session reads them, [T − 1]."""
    state = begin(opened.model)
    return read(opened.model, state, ids, inner=opened.inner, learn=learn).nll[0, 1:]
