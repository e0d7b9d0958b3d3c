"""Readers at different positions as one batch, and back.

What they have read may differ in length, as long as what is left of it has the same shapes: the window is full, or as
full, and as many tokens wait. Then every product and every inner step is one for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from longread.inner_loop.state import ReadingState
from longread.inner_loop.step import from_matrices, matrices


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
    return dataclasses.replace(state, fast=fast, lower_pasts=lower, upper_pasts=upper, run=None, **rest)
