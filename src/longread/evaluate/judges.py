"""Models that judge text by how well they predict it: a Longread model, or any Hugging Face causal language model.

A Longread judge reads as it was trained to: one with fast weights learns while it judges.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longread.config import InnerConfig, UserError
from longread.extras import install_command
from longread.files import FORMAT
from longread.inner_loop import begin, read
from longread.model import Transformer
from longread.tokenizer import Tokenizer, load_tokenizer

PIECE = 1024
"""Tokens that a Hugging Face judge reads at a time, so that not all logits of a text exist at once."""


class Judge(ABC):
    """A language model and its tokenizer. `fingerprint` tells it from the models that it judges."""

    name: str
    tokenizer: Tokenizer
    fingerprint: str
    context_limit: int | None
    """Tokens that it can read at once; None: no limit."""

    @abstractmethod
    def nll(self, tokens: Tensor) -> Tensor:
        """−log p of each token given those before it, [B, n] float64 on the CPU; NaN for the first.

        Args:
            tokens: int64 [B, n] in the judge's own tokenizer.
        """


class LongreadJudge(Judge):
    """A model of this library; one with full attention may have a `context_limit`."""

    def __init__(
        self,
        name: str,
        model: Transformer,
        inner: InnerConfig,
        tokenizer: Tokenizer,
        fingerprint: str,
        *,
        learn: bool = True,
        context_limit: int | None = None,
    ) -> None:
        self.name, self.tokenizer, self.fingerprint = name, tokenizer, fingerprint
        self.context_limit = context_limit
        self._model, self._inner, self._learn = model, inner, learn

    def nll(self, tokens: Tensor) -> Tensor:
        state, tokens = begin(self._model, len(tokens)), tokens.to(self._model.device)
        reading = read(self._model, state, tokens, inner=self._inner, learn=self._learn)
        return reading.nll.double().cpu()


class HuggingFaceJudge(Judge):
    """A directory with a causal language model as `transformers` saves it, tokenizer.json included."""

    def __init__(self, path: str | Path, device: torch.device) -> None:
        path = Path(path)
        self.name = path.name or str(path)
        self.tokenizer = load_tokenizer(path)
        config, weights = path / "config.json", sorted(path.glob("*.safetensors"))
        facts = [config.read_bytes(), *(f"{file.name} {file.stat().st_size}".encode() for file in weights)]
        self.fingerprint = hashlib.sha256(b"\0".join(facts)).hexdigest()
        self._model, self._device = _from_pretrained(path, device), device
        self.context_limit = getattr(self._model.config, "max_position_embeddings", None)
        known = getattr(self._model.config, "vocab_size", None)
        if known is not None and self.tokenizer.vocab_size > known:
            raise UserError(
                f"{path} knows {known} tokens and its tokenizer.json has {self.tokenizer.vocab_size}; "
                "copy there the one it was trained with"
            )

    @torch.no_grad()
    def nll(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self._device)
        losses = [torch.full(tokens[:, :1].shape, torch.nan, dtype=torch.float64)]
        past = None
        for start in range(0, tokens.shape[1] - 1, PIECE):
            piece = tokens[:, start : min(start + PIECE, tokens.shape[1] - 1)]
            found = self._model(input_ids=piece, past_key_values=past, use_cache=True)
            past = found.past_key_values
            targets = tokens[:, start + 1 : start + 1 + piece.shape[1], None]
            losses.append(-found.logits.float().log_softmax(-1).gather(2, targets)[..., 0].double().cpu())
        return torch.cat(losses, 1)[:, : tokens.shape[1]]


def is_hugging_face(path: str | Path) -> bool:
    """Whether a directory's config.json is one of `transformers`: it names a `model_type`, and is not of this library,
    which names one too."""
    try:
        values = json.loads((Path(path) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values and values.get("format") != FORMAT


def _from_pretrained(path: Path, device: torch.device) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UserError(
            f"{path} is a Hugging Face model; to judge with it run {install_command('hf')}, or give a Longread model"
        ) from None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), local_files_only=True, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"{path} holds no causal language model that transformers can open: {reason}") from None
    return model.to(device).eval().requires_grad_(False)
