"""How likely continuations are after their contexts, each in a text of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from longread.config import InnerConfig
from longread.inner_loop import ReadingState, begin, read, rescue
from longread.inner_loop.state import apart, together
from longread.model import Transformer
from longread.session.session import PIECE

_Item = TypeVar("_Item")
Ids = tuple[int, ...]


class ContinuationScore(NamedTuple):
    """Of one continuation."""

    log_likelihood: float
    """log p of its tokens together, in nats, without those that nothing predicts."""
    is_greedy: bool
    """Whether each of these tokens is the likeliest in its place."""


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Reads texts of equal length side by side, as as many sessions would."""

    model: Transformer
    inner: InnerConfig
    learn: bool

    def after(self, prompts: Sequence[Ids]) -> list[ReadingState]:
        """The state after each prompt; all have the same length."""
        tokens = torch.tensor(prompts, dtype=torch.long, device=self.model.device).reshape(len(prompts), -1)
        states = apart(begin(self.model, len(prompts)))
        for part in tokens.split(PIECE, dim=1) if tokens.shape[1] else ():
            before = states
            found = read(self.model, side_by_side(before), part, inner=self.inner, learn=self.learn, guard=True)
            states = apart(found.state)
            for row, own in enumerate(part.split(1) if self.learn else ()):
                alone = found._replace(nll=found.nll[row : row + 1])
                states[row] = rescue(self.model, before[row], own, alone, inner=self.inner) or states[row]
        return states

    def scores(self, states: Sequence[ReadingState], continuations: Sequence[Ids]) -> list[ContinuationScore]:
        """Of continuations that all have the same length, each after its state."""
        tokens = torch.tensor(continuations, dtype=torch.long, device=self.model.device).reshape(len(states), -1)
        unscored = 0 if states[0].position else 1
        if tokens.shape[1] <= unscored:
            return [ContinuationScore(0.0, True)] * len(states)
        found = read(self.model, side_by_side(states), tokens, inner=self.inner, learn=self.learn, guard=True, top=1)
        likeliest = tokens.new_empty(0) if found.top is None else found.top[1].squeeze(-1)
        sums = -found.nll[:, unscored:].double().sum(1)
        greedy = (likeliest == tokens)[:, unscored:].all(1)
        return [ContinuationScore(*facts) for facts in zip(sums.tolist(), greedy.tolist(), strict=True)]


def side_by_side(states: Sequence[ReadingState]) -> ReadingState:
    """One state of texts that are equally long."""
    return dataclasses.replace(together(states), positions=None)


def batches(items: Iterable[_Item], size: int, ids: Callable[[_Item], Sequence[int]]) -> Iterator[list[_Item]]:
    """At most `size` items of equal length at a time, the longest first; the order of `items` changes nothing."""
    waiting: list[_Item] = []
    for item in sorted(items, key=lambda item: (-len(ids(item)), ids(item))):
        if waiting and (len(waiting) == size or len(ids(waiting[0])) != len(ids(item))):
            yield waiting
            waiting = []
        waiting.append(item)
    if waiting:
        yield waiting


def score(
    reader: BatchReader, pairs: Sequence[tuple[Ids, Ids]], batch_size: int
) -> Iterator[tuple[int, ContinuationScore]]:
    """Pairs of a context and a continuation: the index of each and its score, as they become known.

    A context is read once for all its continuations: they go on from the same state, which none of them changes.
    """
    asked: dict[Ids, dict[Ids, list[int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        asked.setdefault(context, {}).setdefault(continuation, []).append(index)
    for contexts in batches(asked, batch_size, lambda context: context):
        states = reader.after(contexts)
        following = [
            (continuation, state, indices)
            for context, state in zip(contexts, states, strict=True)
            for continuation, indices in asked[context].items()
        ]
        for group in batches(following, batch_size, lambda item: item[0]):
            found = reader.scores([state for _, state, _ in group], [continuation for continuation, _, _ in group])
            for (_, _, indices), its_score in zip(group, found, strict=True):
                yield from ((index, its_score) for index in indices)
