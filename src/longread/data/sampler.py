"""Which tokens are in which batch: a pure function of (seed, step, rank).

Letters: B sequences, T tokens of context.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from longread.config import UserError
from longread.data.permutation import mix, permute
from longread.data.shards import TokenDataset

_ORDER, _PHASE = 1, 2  # keep the streams of pseudo-random numbers apart


class Batch(NamedTuple):
    """`input_ids`, `target_ids` int64 [B, T]; `loss_mask` bool [B, T], False where a target is no prediction to learn.

    `target_ids[b, t]` is the token after `input_ids[b, t]`.
    """

    input_ids: Tensor
    target_ids: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return type(self)(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class Sampler:
    """Draws windows of T + 1 tokens in epochs: each visits every window exactly once, in an order of its own.

    Documents "join": the dataset is one ring, cut into `num_tokens // T` windows at a place that each epoch chooses.
    Documents "reset": no window crosses a document. One that is longer than T gives as many full windows as fit: from
    its start in even epochs, from a random place in odd ones, so that what is left over differs. A shorter one gives
    one window, padded, with the padding masked.

    Targets equal to BOS, and the step of the ring from its end to its start, are masked.
    """

    def __init__(self, dataset: TokenDataset, context_length: int, batch_size: int, seed: int) -> None:
        """Raises `UserError` for sizes below 1, a negative seed, and a dataset that gives no window."""
        sizes = (("context_length", context_length, 1), ("batch_size", batch_size, 1), ("seed", seed, 0))
        for name, value, limit in sizes:
            if value < limit:
                raise UserError(f"{name} is {value}; it must be at least {limit}")
        if dataset.documents == "join" and dataset.num_tokens <= context_length:
            raise UserError(
                f"{dataset.directory} has {dataset.num_tokens} tokens; a window of context_length {context_length} "
                f"needs {context_length + 1}: prepare more text, shorten the context, or prepare with documents reset, "
                "whose windows are padded"
            )
        self.dataset = dataset
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        if dataset.documents == "join":
            self.num_windows = dataset.num_tokens // context_length
        else:
            predictions = np.diff(dataset.document_offsets) - 1
            windows = np.where(predictions > 0, np.maximum(1, predictions // context_length), 0)
            self._windows_until = np.cumsum(windows)
            self.num_windows = int(self._windows_until[-1])
            if not self.num_windows:
                raise UserError(f"every document of {dataset.directory} is shorter than 2 tokens; prepare longer texts")

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The share of `rank` in the batch of `step`, B = batch_size / world_size; the shares of all ranks, in order,
        are the same batch for every world size."""
        if step < 0 or not 0 <= rank < world_size:
            raise UserError(f"step {step}, rank {rank} of {world_size}: all count from 0 and rank stays below the size")
        if self.batch_size % world_size:
            raise UserError(f"batch_size {self.batch_size} does not divide among {world_size} ranks; use a multiple")
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        windows = [self._window(*divmod(i, self.num_windows)) for i in range(first, first + share)]
        tokens, masks = (torch.from_numpy(np.stack(column)) for column in zip(*windows, strict=True))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), masks)

    def _window(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [T + 1] and bool [T]."""
        index = permute(index, self.num_windows, mix(self.seed, epoch, _ORDER))
        return self._join(epoch, index) if self.dataset.documents == "join" else self._reset(epoch, index)

    def _join(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        size, T = self.dataset.num_tokens, self.context_length
        start = (mix(self.seed, epoch, _PHASE) + index * T) % size
        tokens = self.dataset.tokens(start, min(start + T + 1, size))
        mask = np.ones(T, dtype=bool)
        if len(tokens) <= T:
            mask[len(tokens) - 1] = False
            tokens = np.concatenate([tokens, self.dataset.tokens(0, T + 1 - len(tokens))])
        return tokens, mask & self._is_text(tokens[1:])

    def _reset(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        T = self.context_length
        document = int(np.searchsorted(self._windows_until, index, side="right"))
        start, stop = self.dataset.document_offsets[document : document + 2].tolist()
        index -= int(self._windows_until[document - 1]) if document else 0
        spare = (stop - start - 1) % T if stop - start > T else 0  # targets that full windows leave over
        start += mix(self.seed, epoch, _PHASE, document) % (spare + 1) * (epoch % 2) + index * T
        tokens = self.dataset.tokens(start, min(start + T + 1, stop))
        padding = T + 1 - len(tokens)
        mask = np.arange(T) < T - padding
        tokens = np.pad(tokens, (0, padding), constant_values=self.dataset.bos_id or 0)
        return tokens, mask & self._is_text(tokens[1:])

    def _is_text(self, targets: np.ndarray) -> np.ndarray:
        bos_id = self.dataset.bos_id
        return np.ones(len(targets), dtype=bool) if bos_id is None else targets != bos_id
