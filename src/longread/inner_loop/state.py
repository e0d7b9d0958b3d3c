"""The state of reading: all that is left of a text after it has been read."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from longread.inner_loop.step import Recorded, matrices
from longread.model import FastWeights, MixerPast


class StateFacts(NamedTuple):
    """What a state is, without a copy of it."""

    position: int
    waiting: int
    """Tokens of the unfinished mini-batch."""
    fast: FastWeights
    nbytes: int
    """Bytes of all tensors of the state."""


@dataclass(frozen=True)
class ReadingState:
    """All that is left of what B sequences have read. A value: reading returns a new one and keeps the old."""

    position: int
    """Tokens read; by the first sequence, where `positions` are given."""
    fast: FastWeights
    lower_pasts: tuple[MixerPast, ...]
    upper_pasts: tuple[MixerPast, ...]
    """Of attention, the window before the unfinished mini-batch, and the tokens in it; of a recurrence, its state."""
    hidden: Tensor
    """Of the unfinished mini-batch's m <= M tokens, [B, m, D], from `Transformer.lower`."""
    targets: Tensor
    """Of all of these but the last, int64 [B, max(0, m − 1)]."""
    targets_mask: Tensor
    output: Tensor
    """`Transformer.upper`'s output for the last token, [B, D]; [B, 0] before the first."""
    positions: Tensor | None = None
    """Tokens read by each sequence, int64 [B], where sequences of the same shapes are at different positions."""
    run: Recorded | None = field(default=None, repr=False, compare=False)
    """Of the unfinished mini-batch, where it is full and came as one: so the step need not run it again. No part of
    what has been read: a copy goes without it."""

    @property
    def start(self) -> int | Tensor:
        """Position of the next token, as `Transformer.lower` takes it."""
        return self.position if self.positions is None else self.positions

    def moved(self, tokens: int) -> dict[str, Any]:
        """The fields that say how much has been read, after so many tokens more."""
        positions = None if self.positions is None else self.positions + tokens
        return {"position": self.position + tokens, "positions": positions}

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the state."""
        pasts = [x for past in (*self.lower_pasts, *self.upper_pasts) for x in past]
        return [*matrices(self.fast), *pasts, self.hidden, self.targets, self.targets_mask, self.output]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def facts(self) -> StateFacts:
        return StateFacts(self.position, self.hidden.shape[1], self.fast, self.nbytes)
