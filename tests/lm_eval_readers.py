"""Tiny readers as lm-evaluation-harness has them, and the requests and the task that it is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longread.checkpoint import save_model
from longread.config import InnerConfig, ModelConfig
from longread.loading import OpenModel
from longread.model import Transformer, initialize
from longread.tokenizer import Tokenizer

M = 16
TEXT = "The keeper trims the lamp, and the lamp burns; the keeper waits, and the night waits with him. " * 3
DOCUMENTS = [TEXT, "Grüße aus dem Tal: es regnet.", "x", TEXT[40:200]]


class Request(NamedTuple):
    """As the harness hands one over."""

    args: tuple[Any, ...]


def save(directory: Path, tokenizer: Tokenizer, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Path:
    """A model of two blocks whose learning shows, with its tokenizer."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=16,
        mini_batch_size=M,
        num_suffix_blocks=1,
    )
    model = Transformer(config).to(dtype)
    initialize(model, seed=seed)
    save_model(directory, model, InnerConfig(lr=2.0, clip=2.0), tokenizer_fingerprint=tokenizer.fingerprint)
    tokenizer.save(directory)
    return directory


def harness_model(directory: Path, **arguments: Any) -> Any:
    """The harness's model, as the harness makes it."""
    from longread.lm_eval import LongreadLM

    return LongreadLM.create_from_arg_obj({"pretrained": str(directory)} | arguments, {"device": "cpu"})


def asked(pairs: Sequence[tuple[Any, ...]]) -> list[Request]:
    return [Request(pair) for pair in pairs]


def directly(opened: OpenModel, context: Sequence[int], continuation: Sequence[int], learn: bool = True) -> float:
    """log p by a session that reads the one and then the other."""
    session = opened.session(learn=learn)
    session.read(context)
    return -session.read(continuation).double().sum().item()


def write_task(directory: Path) -> dict[str, Any]:
    """A local task: bits per byte of whole documents."""
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (directory / "documents.jsonl").write_text("\n".join(lines))
    return {
        "task": "reading",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "documents.jsonl")}, "cache_dir": str(directory)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
