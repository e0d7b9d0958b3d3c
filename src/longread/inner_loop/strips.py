"""Keys and values of one half of the network in places that stay, and when it pays to capture a run on them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from longread.inner_loop.graphs import CheckedGraphs, put_back_later
from longread.model import Past, Transformer

WORTH = 3
"""Plain runs that one capture costs: the run that it is compared with, and twice the launches."""

Result = TypeVar("Result")


class Strips(Generic[Result]):
    """A strip for the keys, and one for the values, of each attention in one half of the network.

    Each run of the half appends what it makes to strips of K + R tokens, and sees the K tokens before, or the fewer
    that there are. When they are full, the newest K move to the front; R is about K, so a token is moved once at most.
    """

    def __init__(
        self, model: Transformer, batch_size: int, blocks: range, run: int, graphs: CheckedGraphs[Result]
    ) -> None:
        """`run`: tokens of the longest run."""
        config = model.config
        windows = [config.window_of(i) or 0 for i in range(config.num_blocks)]
        self.K, self._windows = max(windows), [windows[i] for i in blocks]
        self._room = run * max(1, self.K // run)
        shape = 2, len(blocks), batch_size, self.K + self._room, config.num_kv_heads, config.head_dim
        # token by token in memory: what is appended or moved is one piece
        strips = torch.empty(shape, device=model.device, dtype=model.dtype)
        self._strips, self._rows = strips.transpose(3, 4), strips.flatten(0, 2).unbind()
        self.position = torch.zeros(batch_size, dtype=torch.float64, device=model.device)
        self._first = self._read = 0
        self._graphs, self._runs = graphs, collections.Counter[tuple[int, int, int]]()

    def load(self, pasts: Sequence[Past], position: int, start: int | Tensor) -> None:
        """Takes up the pasts of a token at `position`; `start` says it of each sequence."""
        self._read = min(position, self.K)
        self._first = position if self.missing and position <= self._room else 0  # one place for each short past
        for here, given in zip(self.pasts(), pasts, strict=True):
            for place, x in zip(here, given, strict=True):
                place.copy_(x)
        self.position.copy_(torch.as_tensor(start))

    @property
    def missing(self) -> int:
        """Tokens that the next one sees less than a whole window."""
        return max(0, self.K - self._read)

    def pasts(self, extra: int = 0) -> list[Past]:
        """What the next token can see, and `extra` tokens more: views."""
        end = self.K + self._first
        begins = (end - min(self._read, window + extra) for window in self._windows)
        return [Past(k[:, :, begin:end], v[:, :, begin:end]) for begin, k, v in zip(begins, *self._strips, strict=True)]

    def append(self, own: Sequence[Past]) -> None:
        """Writes the keys and values of the tokens that come now."""
        for *places, made in zip(*self._strips, own, strict=True):
            for place, x in zip(places, made, strict=True):
                place.narrow(2, self.K + self._first, x.shape[2]).copy_(x)

    def run(
        self, tokens: int, runs: int, compute: Callable[[], Result], *kept: Tensor, replayed: bool = True
    ) -> Result:
        """Computes the next so many tokens: plainly, or as a graph where that pays.

        A graph is of one length, one place in the strip and one length of the past. It is captured as soon as it has
        run, or is known to be going to run, `WORTH` times. In a text of which much is still to come that is at once:
        its runs go round R / tokens places. While a window fills, each past is met once a text, so there it is the
        `WORTH`-th text. One reader has at most 2 R / tokens graphs of each length.

        Args:
            runs: of so many tokens that follow one another now, this included.
            kept: what `compute` changes in place, beside the strips, which get the same again.
            replayed: whether there may be graphs.
        """
        if self._first + tokens > self._room:
            self._to_the_front()
        key = tokens, self._first, self.missing
        self._runs[key] += 1
        here = 0 if self.missing else (runs - 1) // (self._room // tokens)
        if replayed and self._runs[key] + here >= WORTH:
            result = self._graphs.run(key, compute, kept=lambda: put_back_later(self.position, *kept), kind=tokens)
        else:
            result = compute()
        self._first, self._read = self._first + tokens, self._read + tokens
        return result

    def _to_the_front(self) -> None:
        step = self._first
        for begin in range(0, self.K, step) if self._rows else ():  # pieces that do not overlap
            end = min(begin + step, self.K)
            newest = [row[begin + step : end + step] for row in self._rows]
            torch._foreach_copy_([row[begin:end] for row in self._rows], newest)
        self._first = 0
