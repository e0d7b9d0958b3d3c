"""The smallest network in which nothing is trivial, and texts for it; shared by the tests of readers."""

from __future__ import annotations

import torch

from longread.config import InnerConfig, ModelConfig, RopeScaling
from longread.model import Transformer, initialize

M = 4
INNER = InnerConfig(lr=0.7, clip=0.5)


GROUPED = {"num_heads": 4, "kv_heads": 2, "head_size": 6, "qkv_bias": True, "fast_hidden": 10}
"""As pretrained models have it: queries share keys and values."""
BY_BLOCK = {
    "kv_heads": 1,
    "head_size": 12,
    "gate": "gelu_tanh",
    "embedding_scale": 4.0,
    "fast_post_norm": False,
    "block_windows": (3, 0, 4, 0),
    "block_rope": ("local", "global", "none", "global"),
    "local_rope_base": 30.0,
    "rope_scaling": RopeScaling(kind="linear", factor=2),
}
"""And: blocks that differ in window and rotary embedding."""


def config(**changes: object) -> ModelConfig:
    """Four blocks, two of which learn; `changes` are fields."""
    fields = {
        "vocab_size": 19,
        "width": 16,
        "num_blocks": 4,
        "num_heads": 2,
        "mlp_hidden": 24,
        "window_size": 6,
        "mini_batch_size": M,
        "num_suffix_blocks": 2,
    }
    return ModelConfig(**fields | changes)  # type: ignore[arg-type]


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    """The network of `config`, with drawn weights."""
    model = Transformer(config(**changes)).to(dtype)
    initialize(model, seed=seed)
    return model


def text(n: int, seed: int = 0) -> list[int]:
    """Token ids."""
    return torch.randint(19, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
