"""The state of reading: all that is left of a text after it has been read.

Readers at different positions can be one batch. What they have read may differ in length, as long as what is left of it
has the same shapes: the window is full, or as full, and as many tokens wait. Then every product and every inner step is
one for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.inner_loop.kept import Kept, nothing_kept
from longread.inner_loop.step import Recorded, from_matrices, matrices
from longread.model import FastWeights, MixerPast, Transformer


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
    kept: Kept | None = None
    """What has left the window and is seen all the same, where the model keeps any of it."""
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
        kept = self.kept.tensors if self.kept else []
        return [*matrices(self.fast), *pasts, self.hidden, self.targets, self.targets_mask, self.output, *kept]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def facts(self) -> StateFacts:
        return StateFacts(self.position, self.hidden.shape[1], self.fast, self.nbytes)


def begin(model: Transformer, batch_size: int = 1) -> ReadingState:
    """The state of sequences that have read nothing."""
    with torch.no_grad():
        lower_pasts, upper_pasts = model.empty_pasts(batch_size)
        kept = nothing_kept(model, batch_size) if model.config.kept_tokens else None
    fast = tuple(type(w)(*(x.detach() for x in w)) for w in model.initial_fast_weights(batch_size))
    none = torch.empty(batch_size, 0, device=model.device, dtype=model.dtype)
    return ReadingState(
        position=0,
        fast=fast,
        lower_pasts=lower_pasts,
        upper_pasts=upper_pasts,
        hidden=none.new_empty(batch_size, 0, model.config.width),
        targets=none.long(),
        targets_mask=none.bool(),
        output=none,
        kept=kept,
    )


@torch.no_grad()
def next_token_logits(model: Transformer, state: ReadingState) -> Tensor:
    """Logits of the next token, [B, V]. Raises `ValueError` before the first token."""
    if not state.output.shape[1]:
        raise ValueError("nothing has been read yet; read at least one token (the BOS, say) first")
    return model.logits(state.output)


def shapes_of(state: ReadingState) -> Hashable:
    """Equal for states that can be one batch."""
    return tuple((*x.shape[1:], x.dtype) for x in state.tensors)


def together(states: Sequence[ReadingState]) -> ReadingState:
    """One state of all sequences, in order; their shapes must be equal."""
    if len(states) == 1:
        return states[0]
    positions: list[int] = []
    for state in states:
        own = state.positions
        positions += [state.position] * state.output.shape[0] if own is None else own.tolist()
    parts = iter([torch.cat(tensors) for tensors in zip(*(state.tensors for state in states), strict=True)])
    return dataclasses.replace(
        _mapped(states[0], lambda x: next(parts)),
        positions=torch.tensor(positions, device=states[0].output.device),
    )


def apart(state: ReadingState) -> list[ReadingState]:
    """A state of its own for each sequence; they share no memory with each other."""
    B = state.output.shape[0]
    if B == 1:
        return [compact(state)]
    positions = [state.position] * B if state.positions is None else state.positions.tolist()
    return [
        dataclasses.replace(_mapped(state, lambda x, b=b: x[b : b + 1].clone()), position=position, positions=None)  # type: ignore[misc]
        for b, position in enumerate(positions)
    ]


def compact(state: ReadingState) -> ReadingState:
    """The same without the memory that is kept only because a tensor is part of a larger one."""
    alone = _mapped(state, lambda x: x if x.untyped_storage().nbytes() <= x.nbytes else x.clone())
    return dataclasses.replace(alone, run=state.run)


def copied(state: ReadingState) -> ReadingState:
    """The same in memory of its own."""
    return _mapped(state, lambda x: x.clone(memory_format=torch.contiguous_format))


def moved_to(
    state: ReadingState, device: torch.device, moved: Callable[[Tensor, torch.device], Tensor] = Tensor.to
) -> ReadingState:
    """The same on another device; `moved` gives each tensor there."""
    return _mapped(state, lambda x: moved(x, device))


def _mapped(state: ReadingState, change: Callable[[Tensor], Tensor]) -> ReadingState:
    """The state with every tensor changed, in the order of `ReadingState.tensors`."""
    fast = from_matrices([change(w) for w in matrices(state.fast)])
    lower, upper = (
        tuple(type(past)(*map(change, past)) for past in pasts) for pasts in (state.lower_pasts, state.upper_pasts)
    )
    names = ("hidden", "targets", "targets_mask", "output")
    rest: dict[str, Any] = {name: change(getattr(state, name)) for name in names}
    rest["kept"] = state.kept and state.kept.mapped(change)
    return dataclasses.replace(state, fast=fast, lower_pasts=lower, upper_pasts=upper, run=None, **rest)


@torch.no_grad()
def drift(model: Transformer, fast: FastWeights) -> Tensor:
    """‖W − W_0‖ / ‖W_0‖ over all fast weights of each sequence, [B]. Where all of W_0 is 0 it is ‖W − W_0‖.

    Args:
        fast: of the suffix, which has at least one block; on any device. One matrix at a time goes there.
    """
    moved, initial = [], []
    for w, w0 in zip(matrices(fast), matrices(model.initial_fast_weights(1)), strict=True):
        there = w0.to(w.device)
        moved.append((w - there).flatten(1).square_().sum(1))
        initial.append(there.flatten(1).square().sum(1))
    distance, size = torch.stack(moved).sum(0).sqrt(), torch.stack(initial).sum(0).sqrt()
    return torch.where(size > 0, distance / size, distance)
