"""Operations of one training step by its parts.

    inner steps   each mini-batch but the last scored above the lowest fast MLP, and its gradient for the fast weights
    outer step    the rest: everything below, the last mini-batch, and the outer gradient through all of it
    recomputed    what a schedule of recomputation runs once more (`longread.outer_loop`)

In units of a forward, "kept" where no inner gradient is differentiated (first-order, or before a cut), and each weight
that is not trained less by what its gradient takes:

                                             inner    outer, exact    outer, kept    last mini-batch, static loss
    below the lowest fast MLP                    0               3              3                               3
    products with slow weights above it          2               4              2                               3
    products with fast weights                   3               6              2                               3
    gate and up of the lowest fast MLP           2               4              2                               3
    scores                                       2               4              2                               3
      and over the mini-batch's own keys         1               2              0                               0

A product y = x Wᵀ has two factors, so its gradient is two products, and the gradient of that two for each. The inner
gradient of a slow weight is not taken, nor that of earlier keys and values, nor that of the lowest fast MLP's input. In
the mini-batch after a cut the outer gradient of earlier keys and values is not taken: 1 less, 2 less where exact.

On a GPU the cross-entropy spares one of the head's 2 where the outer gradient is kept: for each token the inner one has
the same direction.
"""

from __future__ import annotations

from typing import NamedTuple

from longread.config import Loss, MetaGradient, ModelConfig, Recompute, RunConfig, recomputation
from longread.flops.network import (
    head_flops,
    lower_attentions,
    mlp_flops,
    projection_flops,
    score_flops,
    upper_attentions,
)


class TrainingFlops(NamedTuple):
    """Operations of training by what they are for."""

    inner: float
    outer: float
    recomputed: float

    @property
    def model(self) -> float:
        """The operations of the method, computed once."""
        return self.inner + self.outer

    @property
    def total(self) -> float:
        return sum(self)


def training_flops(config: ModelConfig, tokens: int, loss: Loss) -> float:
    """Of one token of a training sequence of `tokens`, with the exact meta-gradient."""
    return sequence_flops(config, tokens, loss).model / tokens


def recomputed_flops(config: ModelConfig, tokens: int, loss: Loss, recompute: Recompute) -> float:
    """Of one token of a training sequence of `tokens`, what is computed again besides."""
    return sequence_flops(config, tokens, loss, recompute).recomputed / tokens


def step_flops(config: RunConfig, recompute: Recompute) -> TrainingFlops | None:
    """Of one step of a run, all its sequences together; None for networks whose mixers are not counted.

    Ranks that divide the fast MLPs compute the rest of a sequence alike; that counts once.
    """
    if config.model.mixer != "attention":
        return None
    found = sequence_flops(
        config.model,
        config.context_length,
        config.loss,
        recompute,
        meta_gradient=config.meta_gradient,
        truncate_after=config.truncate_after,
        trained_blocks=config.trained_blocks,
    )
    return TrainingFlops(*(config.batch_size * each for each in found))


def sequence_flops(
    config: ModelConfig,
    tokens: int,
    loss: Loss,
    recompute: Recompute = "none",
    *,
    meta_gradient: MetaGradient = "exact",
    truncate_after: int | None = None,
    trained_blocks: int | None = None,
) -> TrainingFlops:
    """Of one training sequence of `tokens`; the settings are those of `RunConfig`.

    Only attention is counted among the mixers.
    """
    parts = _Parts(config, tokens, trained_blocks)
    below, schedule = parts.below, recomputation(recompute, config, loss, tokens)
    again = parts.blocks_again(schedule.blocks)
    if loss == "static":
        again += parts.upper_blocks_again(schedule.blocks)
        return TrainingFlops(0.0, below + parts.plain(0, tokens), again)
    M = config.mini_batch_size
    count = tokens // M
    cut = truncate_after or count
    exact = [meta_gradient == "exact" and (i + 1) % cut != 0 for i in range(count - 1)]
    inner = sum(parts.inner(i) for i in range(count - 1))
    outer = sum(parts.through(i, exact=exact[i]) for i in range(count - 1))
    last = parts.plain(tokens - M, tokens)
    outer -= sum(parts.of_constant_past(i) * (2 if i < count - 1 and exact[i] else 1) for i in range(cut, count, cut))
    again += sum(parts.inner(i) for i in range(schedule.steps))
    if schedule.attention:
        again += parts.scores_again
    return TrainingFlops(inner, below + outer + last, again)


class _Parts:
    """The parts of one sequence; trained are the last `trained` blocks and the final norm, or everything."""

    def __init__(self, config: ModelConfig, tokens: int, trained: int | None) -> None:
        self._config, self._tokens = config, tokens
        self._lowest = 0 if trained is None else config.num_blocks - trained
        """The lowest block that is trained."""
        self._M, S = config.mini_batch_size, config.num_suffix_blocks
        suffix = range(config.num_prefix_blocks, config.num_blocks)
        self._attentions = upper_attentions(config)
        projections, static = projection_flops(config), mlp_flops(config)
        self._slow = len(self._attentions) * projections + S * static + head_flops(config)
        self._untrained = (
            sum(projections for i in self._attentions if i < self._lowest)
            + sum(static for i in suffix if i < self._lowest)
            + (0.0 if trained is None else head_flops(config))
        )
        """Of slow weights above the lowest fast MLP, those that get no gradient."""
        self._fast = S * mlp_flops(config, fast=True)
        self._entry = 2 / 3 * mlp_flops(config, fast=True) if S else 0.0
        """Gate and up of the lowest fast MLP."""

    def _scores(self, first: int, last: int) -> float:
        """Of the tokens from `first` to before `last` in the attentions above the lowest fast MLP."""

        def until(tokens: int, block: int) -> float:
            return tokens * score_flops(self._config, block, tokens) if tokens else 0.0

        return sum(until(last, block) - until(first, block) for block in self._attentions)

    def _own_scores(self, first: int, last: int) -> float:
        """The same of one mini-batch, over its own keys alone."""
        return sum((last - first) * score_flops(self._config, block, last - first) for block in self._attentions)

    @property
    def below(self) -> float:
        """Forward and gradient of what no fast weight touches, which runs over the whole sequence."""
        config, T = self._config, self._tokens
        found = 0.0
        for block in lower_attentions(config):
            times = 1 if block < self._lowest else 3
            found += times * T * (projection_flops(config) + score_flops(config, block, T))
            if block < config.num_prefix_blocks:
                found += times * T * mlp_flops(config)
        return found

    def plain(self, first: int, last: int) -> float:
        """Forward and gradient above, with no inner step, of the tokens from `first` to before `last`."""
        forward = (last - first) * (self._slow + self._fast) + self._scores(first, last)
        return 3 * forward - (last - first) * self._untrained

    def inner(self, index: int) -> float:
        """The step on one mini-batch: forward, and the gradient for the fast weights."""
        first, last = index * self._M, (index + 1) * self._M
        products = self._M * (2 * self._slow + 3 * self._fast - self._entry)
        return products + 2 * self._scores(first, last) + self._own_scores(first, last)

    def through(self, index: int, *, exact: bool) -> float:
        """The outer gradient through one mini-batch; `exact`: through its inner gradient too."""
        first, last = index * self._M, (index + 1) * self._M
        untrained = self._M * self._untrained
        forward = 2 * (self._M * (self._slow + self._fast) + self._scores(first, last)) - untrained
        if not exact:
            return forward
        tangents = self._M * (2 * self._slow + 4 * self._fast - 2 * self._entry) - untrained
        return forward + tangents + 2 * self._scores(first, last) + 2 * self._own_scores(first, last)

    def of_constant_past(self, index: int) -> float:
        """What the gradient of the past's keys and values takes, or the gradient of that: neither behind a cut."""
        first, last = index * self._M, (index + 1) * self._M
        return self._scores(first, last) - self._own_scores(first, last)

    def blocks_again(self, blocks: int) -> float:
        """The lowest so many blocks, those of `lower` that are trained, forward once more but for their scores."""
        config = self._config
        trained = [block for block in lower_attentions(config) if self._lowest <= block < blocks]
        mlps = sum(block < config.num_prefix_blocks for block in trained)
        return self._tokens * (len(trained) * projection_flops(config) + mlps * mlp_flops(config))

    @property
    def scores_again(self) -> float:
        """The scores of these blocks once more."""
        config, T = self._config, self._tokens
        return sum(T * score_flops(config, block, T) for block in lower_attentions(config) if block >= self._lowest)

    def upper_blocks_again(self, blocks: int) -> float:
        """The same of `upper`, which runs over the whole sequence with the static loss."""
        config = self._config
        attentions = sum(self._lowest <= block < blocks for block in self._attentions)
        mlps = sum(self._lowest <= block < blocks for block in range(config.num_prefix_blocks, config.num_blocks))
        both = mlp_flops(config) + mlp_flops(config, fast=True)
        return self._tokens * (attentions * projection_flops(config) + mlps * both)
