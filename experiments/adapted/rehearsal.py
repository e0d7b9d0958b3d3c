"""A tiny Llama of drawn weights in the place of SmolLM2, so that every job can be run on a CPU in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, HIDDEN, BLOCKS, HEADS = 32, 96, 30, 2
SETS = ("batch_size=2", "micro_batch_size=2")
"""Further settings of every training run."""


def tiny_llama(directory: Path, tokens: Path) -> None:
    """Writes it as Transformers does, with the tokenizer of the data set `tokens`."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = json.loads((tokens / "index.json").read_text(encoding="utf-8"))["vocab_size"]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": WIDTH // HEADS,
        "vocab_size": vocab_size,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in tokens.glob("tokenizer*.json"):
        shutil.copyfile(path, directory / path.name)
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) * columns**-0.5

    weights = {"model.embed_tokens.weight": matrix(vocab_size, WIDTH), "model.norm.weight": torch.ones(WIDTH)}
    heads = {"q": WIDTH, "k": WIDTH // HEADS, "v": WIDTH // HEADS, "o": WIDTH}
    for i in range(BLOCKS):
        block = f"model.layers.{i}"
        weights |= {f"{block}.self_attn.{name}_proj.weight": matrix(rows, WIDTH) for name, rows in heads.items()}
        weights |= {f"{block}.mlp.{name}_proj.weight": matrix(HIDDEN, WIDTH) for name in ("gate", "up")}
        weights[f"{block}.mlp.down_proj.weight"] = matrix(WIDTH, HIDDEN)
        weights |= {f"{block}.{name}_layernorm.weight": torch.ones(WIDTH) for name in ("input", "post_attention")}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
