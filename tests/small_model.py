"""A model of two blocks with the byte tokenizer, and a text, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

from longread.checkpoint import save_model
from longread.config import InnerConfig, ModelConfig
from longread.model import Transformer, initialize
from longread.tokenizer import ByteTokenizer

TEXT = " ".join(f"Sentence {i} says {i * i % 101}." for i in range(30))


def save_small_model(directory: Path, seed: int, *, window_size: int = 48, mini_batch_size: int = 32) -> None:
    """Writes the model and its tokenizer into a new directory."""
    config = ModelConfig(
        vocab_size=257,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=window_size,
        mini_batch_size=mini_batch_size,
        num_suffix_blocks=1,
    )
    model = Transformer(config)
    initialize(model, seed=seed)
    save_model(directory, model, InnerConfig(), tokenizer_fingerprint=ByteTokenizer().fingerprint)
    ByteTokenizer().save(directory)
