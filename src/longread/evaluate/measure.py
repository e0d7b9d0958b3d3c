"""Read documents with one model and keep what the figures need: losses by position, gradient norms, drift."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from longread.config import InnerConfig, UserError
from longread.evaluate.positions import PositionLoss
from longread.inner_loop import begin, read
from longread.model import Transformer

TOKENS_PER_CALL = {"cpu": 1024, "cuda": 32_768}
"""Of each document; on a GPU long pieces are read as CUDA graphs."""


class Document(NamedTuple):
    """One text to read: `tokens` int64 [n] and, where known, the UTF-8 bytes each of them covers, [n]."""

    name: str
    tokens: np.ndarray
    byte_lengths: np.ndarray | None = None


@dataclass(slots=True)
class InnerSteps:
    """Running health of the inner loop: how large its gradients are and how many of them were clipped."""

    clip: float | None
    count: int = 0
    clipped: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, norms: np.ndarray) -> None:
        """Takes the gradient norms of the next inner steps, any shape."""
        if norms.size:
            self.count += norms.size
            self.total += float(norms.sum())
            self.largest = max(self.largest, float(norms.max()))
            self.clipped += 0 if self.clip is None else int((norms > self.clip).sum())


@dataclass(slots=True)
class Measurement:
    """All documents read by one model in one way (`learn`ing or frozen)."""

    model: str
    learn: bool
    losses: list[PositionLoss]
    inner_steps: InnerSteps
    num_parameters: int = 0
    num_fast_weights: int = 0
    drift: dict[int, list[float]] = field(default_factory=dict)
    """Tokens read -> one relative distance of the fast weights from where they began per document."""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def reading(self) -> str:
        if not self.num_fast_weights:
            return "static"
        return "learning" if self.learn else "frozen"


def measure(
    name: str,
    model: Transformer,
    inner: InnerConfig,
    documents: Sequence[Document],
    edges: np.ndarray,
    *,
    learn: bool,
    batch_size: int = 8,
    bos_id: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Measurement:
    """Reads every document once, several side by side.

    Documents of one batch are padded at the end with targets that count for nothing, so each gets exactly the
    losses it has alone. A token equal to `bos_id` is not scored, as in training.

    Raises:
        UserError: a document holds a token that the model does not know.
    """
    result = Measurement(
        name,
        learn and model.config.num_suffix_blocks > 0,
        [PositionLoss(edges) for _ in documents],
        InnerSteps(inner.clip),
        model.config.num_parameters,
        model.config.num_fast_weights,
    )
    for document in documents:
        check_vocabulary(document, model.config.vocab_size)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))
    started = time.perf_counter()
    for first in range(0, len(order), batch_size):
        _read_batch(result, model, inner, documents, order[first : first + batch_size], bos_id, on_tokens)
    result.seconds = time.perf_counter() - started
    return result


def check_vocabulary(document: Document, vocab_size: int) -> None:
    """Raises `UserError` if the document holds a token id outside 0 … vocab_size - 1."""
    if len(document.tokens) and not 0 <= document.tokens.min() <= (largest := int(document.tokens.max())) < vocab_size:
        raise UserError(
            f"{document.name} holds token id {largest} but the model knows ids 0 to {vocab_size - 1}; "
            "prepare the text with the model's own tokenizer"
        )


def _read_batch(
    result: Measurement,
    model: Transformer,
    inner: InnerConfig,
    documents: Sequence[Document],
    members: list[int],
    bos_id: int | None,
    on_tokens: Callable[[int], None] | None,
) -> None:
    device = next(model.parameters()).device
    lengths = np.array([len(documents[i].tokens) for i in members])
    M = model.config.mini_batch_size
    stride = max(M, TOKENS_PER_CALL.get(device.type, 1024) // M * M)
    tokens = np.zeros((len(members), int(lengths.max())), dtype=np.int64)
    for row, i in enumerate(members):
        tokens[row, : lengths[row]] = documents[i].tokens
    scored = np.arange(tokens.shape[1]) < lengths[:, None]
    if bos_id is not None:
        scored &= tokens != bos_id
    state = begin(model, len(members))
    origin = [tensor for block in state.fast for tensor in block]
    for start in range(0, tokens.shape[1], stride):
        span = slice(start, start + stride)
        chunk, mask = torch.from_numpy(tokens[:, span]).to(device), torch.from_numpy(scored[:, span]).to(device)
        reading = read(model, state, chunk, inner=inner, learn=result.learn, loss_mask=mask)
        state = reading.state
        nll = np.where(scored[:, span], reading.nll.double().cpu().numpy(), np.nan)
        norms = reading.inner_grad_norm.double().cpu().numpy()
        steps_before = max(0, start - 1) // M
        drift = _drift(origin, [tensor for block in state.fast for tensor in block]) if result.learn else None
        for row, i in enumerate(members):
            present = int(np.clip(lengths[row] - start, 0, chunk.shape[1]))
            if not present:
                continue
            byte_lengths = documents[i].byte_lengths
            result.losses[i].add(nll[row, :present], None if byte_lengths is None else byte_lengths[span])
            result.tokens += present
            if result.learn:
                own_steps = max(0, lengths[row] - 1) // M - steps_before
                result.inner_steps.add(norms[row, : max(0, own_steps)])
            if drift is not None and present == chunk.shape[1]:
                result.drift.setdefault(start + present, []).append(float(drift[row]))
        if on_tokens:
            on_tokens(int(np.clip(lengths - start, 0, chunk.shape[1]).sum()))


def _drift(origin: list[torch.Tensor], now: list[torch.Tensor]) -> np.ndarray:
    """How far each sequence's fast weights are from their origin, relative to its size, [B]."""
    distance = sum((a.float() - b.float()).flatten(1).square().sum(1) for a, b in zip(now, origin, strict=True))
    size = sum(b.float().flatten(1).square().sum(1) for b in origin)
    return (torch.as_tensor(distance) / torch.as_tensor(size)).sqrt().cpu().numpy()
