"""Read documents with one model and keep what the figures need: losses by position, gradient norms, drift."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from longread.config import InnerConfig, UserError
from longread.evaluate.health import Divergence, InnerSteps, StepsByPosition, settle
from longread.evaluate.positions import BytePositionLoss, PositionLoss
from longread.inner_loop import begin, drift, read
from longread.model import Transformer

TOKENS_PER_CALL = {"cpu": 1024, "cuda": 32_768}
"""Of each document; on a GPU long pieces are read as CUDA graphs."""
CLOSE_TOKENS = 1024
"""Where the drift is to be known at many positions, on any device."""


class Document(NamedTuple):
    """One text to read: `tokens` int64 [n] and, where known, the UTF-8 bytes each of them covers, [n]."""

    name: str
    tokens: np.ndarray
    byte_lengths: np.ndarray | None = None
    common_bytes: tuple[int, int] | None = None
    """Where models of different tokenizers are compared (`in_common`): the bytes that each of them scores."""

    def losses(self, edges: np.ndarray) -> PositionLoss:
        """An empty count of the losses of this text, by byte or by token."""
        return PositionLoss(edges) if self.common_bytes is None else BytePositionLoss(edges, self.common_bytes)


@dataclass(slots=True)
class Measurement:
    """All documents read by one model in one way (`learn`ing or frozen)."""

    model: str
    learn: bool
    losses: list[PositionLoss]
    inner_steps: InnerSteps
    num_parameters: int = 0
    num_fast_weights: int = 0
    steps_by_position: StepsByPosition | None = None
    diverged: list[Divergence] = field(default_factory=list)
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
    close: bool = False,
    on_tokens: Callable[[int], None] | None = None,
) -> Measurement:
    """Reads every document once, several side by side.

    Documents of one batch are padded at the end with targets that count for nothing, so each gets exactly the
    losses it has alone. A token equal to `bos_id` is not scored, as in training. A loss that is not finite counts as
    infinite. `close` measures the drift at M times powers of two and every 1024 tokens.

    Raises:
        UserError: a document holds a token that the model does not know.
    """
    result = Measurement(
        name,
        learn and model.config.num_suffix_blocks > 0,
        [document.losses(edges) for document in documents],
        InnerSteps(inner.clip),
        model.config.num_parameters,
        model.config.num_fast_weights,
        StepsByPosition(inner.clip, model.config.mini_batch_size),
    )
    for document in documents:
        check_vocabulary(document, model.config.vocab_size)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))
    started = time.perf_counter()
    for first in range(0, len(order), batch_size):
        _read_batch(result, model, inner, documents, order[first : first + batch_size], bos_id, close, on_tokens)
    result.seconds = time.perf_counter() - started
    return result


def in_common(readings: Sequence[Sequence[Document]]) -> list[list[Document]]:
    """The same texts in the tokens of several tokenizers, each with the bytes that all of them score.

    The first token of a text has no loss, so bytes count from where the longest first token ends, up to where the
    shortest reading does.

    Raises:
        UserError: the bytes of some token are not known.
    """
    found: list[list[Document]] = [[] for _ in readings]
    for same in zip(*readings, strict=True):
        lengths = [document.byte_lengths for document in same if document.byte_lengths is not None]
        if len(lengths) < len(same):
            raise UserError(
                f"the bytes of the tokens of {same[0].name} are not known, and models with different tokenizers are "
                "compared by bytes; give the texts themselves"
            )
        first, last = max(int(sizes[:1].sum()) for sizes in lengths), min(int(sizes.sum()) for sizes in lengths)
        for documents, document, sizes in zip(found, same, lengths, strict=True):
            begins = np.cumsum(sizes) - sizes
            count = int(((begins < last) | ((begins == last) & (sizes == 0))).sum())
            documents.append(Document(document.name, document.tokens[:count], sizes[:count], (first, last)))
    return found


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
    close: bool,
    on_tokens: Callable[[int], None] | None,
) -> None:
    device = next(model.parameters()).device
    lengths = np.array([len(documents[i].tokens) for i in members])
    M = model.config.mini_batch_size
    tokens = np.zeros((len(members), int(lengths.max())), dtype=np.int64)
    for row, i in enumerate(members):
        tokens[row, : lengths[row]] = documents[i].tokens
    scored = np.arange(tokens.shape[1]) < lengths[:, None]
    if bos_id is not None:
        scored &= tokens != bos_id
    state = begin(model, len(members))
    broken: set[int] = set()
    for start, end in pairwise(
        _cuts(tokens.shape[1], M, CLOSE_TOKENS if close else TOKENS_PER_CALL.get(device.type, 1024), close)
    ):
        span = slice(start, end)
        chunk, mask = torch.from_numpy(tokens[:, span]).to(device), torch.from_numpy(scored[:, span]).to(device)
        reading = read(model, state, chunk, inner=inner, learn=result.learn, loss_mask=mask)
        state = reading.state
        nll = np.where(scored[:, span], reading.nll.double().cpu().numpy(), np.nan)
        norms = reading.inner_grad_norm.double().cpu().numpy()
        steps_before = max(0, start - 1) // M
        moved = drift(model, state.fast).cpu().numpy() if result.learn and state.fast else None
        for row, i in enumerate(members):
            present = int(np.clip(lengths[row] - start, 0, chunk.shape[1]))
            if not present:
                continue
            byte_lengths = documents[i].byte_lengths
            own = norms[row, : max(0, max(0, lengths[row] - 1) // M - steps_before)] if result.learn else norms[row, :0]
            losses, found = settle(documents[i].name, nll[row], scored[row, span], own, start=start, M=M)
            if found and i not in broken:
                broken.add(i)
                result.diverged.append(found)
            result.losses[i].add(losses[:present], None if byte_lengths is None else byte_lengths[span])
            result.tokens += present
            result.inner_steps.add(own)
            if result.steps_by_position is not None:
                result.steps_by_position.add(own, steps_before)
            if moved is not None and present == chunk.shape[1] and np.isfinite(moved[row]):
                result.drift.setdefault(start + present, []).append(float(moved[row]))
        if on_tokens:
            on_tokens(int(np.clip(lengths - start, 0, chunk.shape[1]).sum()))


def _cuts(total: int, M: int, tokens: int, close: bool) -> list[int]:
    """Where pieces of about `tokens` begin and end: at borders of mini-batches; `close`: also early on."""
    stride = max(M, tokens // M * M)
    cuts = {0, total, *range(stride, total, stride)}
    if close:
        cuts |= {cut for k in range(20) if (cut := M << k) < min(stride, total)}
    return sorted(cuts)
