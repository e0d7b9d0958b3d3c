"""A pretrained model as a place that tensors are read from, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """A tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """That it is given in; of quantised ones float32."""
    quantised: str | None = None
    """How it is stored, where its numbers are no numbers of that type."""


class TensorSource(ABC):
    """Tensors by the names that their file has for them."""

    where: str
    """The file or directory, for messages."""
    tensors: Mapping[str, Stored]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises `UserError` if it cannot be read."""

    @abstractmethod
    def name_of(self, part: str, *, post_norm: bool) -> str:
        """The source's name of one of our parameters, "blocks.3.attention.query.weight" for instance.

        Args:
            post_norm: the network has norms behind its sub-layers.
        """

    @abstractmethod
    def is_ignored(self, name: str) -> bool:
        """Whether a tensor has no part in the text model: tables that are computed, or another modality."""
