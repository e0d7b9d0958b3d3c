"""Reading any text in any pieces, in constant memory and without a graph.

The step on mini-batch i needs the targets of its M tokens, and the last of these is the first token of
mini-batch i + 1. So the step is taken only once that token has arrived; until then the mini-batch is unfinished
and its tokens are scored, and new ones predicted, with the weights before the step. This makes reading at once,
in pieces, or token by token the same computation.

A long reading can stand still for a moment (`_Pauses`), so that whoever called it can do something else.

A guard refuses steps that are no numbers or far too long. Many short steps can still lead where the reader predicts
worse than one that knows nothing. Whether learning or the text is to blame shows by reading the same tokens frozen
(`rescue`): a strange text is strange to every reader, and nothing is lost by having learned from it.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.captured import captured_reader
from longread.inner_loop.captured_kept import kept_tokens_reader
from longread.inner_loop.finishing import finish
from longread.inner_loop.halves import Ahead, lower_stretches, threads_below
from longread.inner_loop.kept import Kept, decided, long_pasts, undecided
from longread.inner_loop.optimizers import optimizer_named
from longread.inner_loop.state import ReadingState, begin
from longread.inner_loop.step import Carry, Recorded, from_matrices, inner_step, recorded, step_norm_limit
from longread.model import FastWeights, MixerPast, Transformer, can_capture
from longread.ops.clipped_sgd import refused

STRETCH = 2048
"""Tokens for which the lower half of the network runs at once, about: larger is faster, smaller is leaner."""
GPU_STRETCH = 8192
"""The same on a GPU where nothing is learned: fewer kernels to launch."""
LOGITS_AT_A_TIME = 256
"""Tokens of a sequence whose logits exist together, where the likeliest are asked for."""
STEP = 3
"""A mini-batch with its step is so many passes of the upper half: one forward, and backward twice as much."""
FEWEST = 32
"""Tokens on which a verdict over learning can rest, or a mini-batch if that is shorter."""
MARGIN = 1.0
"""Nats per token by which a frozen reader must be better."""


class Reading(NamedTuple):
    """The result of reading some tokens."""

    state: ReadingState
    nll: Tensor
    """−log p(token | everything before it), [B, n]; NaN for the first token of all, which nothing predicts."""
    inner_grad_norm: Tensor
    """Norm of each step's gradient before clipping, [B, steps]."""
    rolled_back: Tensor
    """Which of these steps the guard refused, bool [B, steps]; none without `guard`."""
    top: tuple[Tensor, Tensor] | None = None
    """log p and ids of the likeliest tokens in the place of each token, [B, n, top]; NaN for the first of all."""
    outputs: Tensor | None = None
    """The input of `Transformer.logits` for the logits of the token after each token, [B, n, D], where asked for."""


@torch.no_grad()
def read(
    model: Transformer,
    state: ReadingState,
    tokens: Tensor,
    *,
    inner: InnerConfig,
    learn: bool = True,
    loss_mask: Tensor | None = None,
    guard: bool = False,
    top: int = 0,
    outputs: bool = False,
    pause: Callable[[], None] | None = None,
) -> Reading:
    """Reads n more tokens of each sequence.

    Args:
        tokens: int64 [B, n], n >= 0.
        inner: rule, rate and clip of the steps; its warm-up belongs to training and is over here.
        learn: False reads with the weights as they are, and drops an unfinished mini-batch: tokens read
            frozen are never learned from, nor is a mini-batch that they interrupt.
        loss_mask: bool [B, n], False for tokens that are no targets of the inner loss; None: all count.
        guard: refuse a step whose gradient is not finite, or that is longer than `step_norm_limit`: that mini-batch is
            read without learning, and the state stays good. Decided on the device, which is not waited for.
        top: how many of the likeliest tokens to find in the place of each token; costs all logits.
        outputs: whether to keep the outputs of all tokens.
        pause: called in between, after about a mini-batch's work each time (`_Pauses`), where nothing is half done: it
            may read and write with the same model. What it raises ends the reading, of which then nothing is left.
            CUDA graphs do not pause.
    """
    pauses = _Pauses(model, pause, learn=learn)
    return _Reader(model, state, inner, pauses, guard, top, outputs).result(tokens, learn, loss_mask)


@torch.no_grad()
def read_guarded(
    model: Transformer, state: ReadingState, tokens: Tensor, *, inner: InnerConfig, learn: bool = True
) -> Reading:
    """`read` of one text, int64 [1, n], that learning cannot break: with a guard, and with `rescue` where many steps
    have led astray; then all steps of this reading count as rolled back."""
    pauses = _Pauses(model, None, learn=learn)
    found = _Reader(model, state, inner, pauses, guard=True).result(tokens, learn)
    rescued = rescue(model, state, tokens, found, inner=inner) if learn else None
    if rescued is None:
        return found
    return found._replace(state=rescued, rolled_back=torch.ones_like(found.rolled_back))


def rescue(
    model: Transformer, before: ReadingState, tokens: Tensor, reading: Reading, *, inner: InnerConfig
) -> ReadingState | None:
    """A state to go on with where learning has broken the reader of one text; None where it has not.

    It is looked for only when the newest tokens, at most a mini-batch, cost more than ln V + `MARGIN` each. Then the
    tokens are read again without learning, with the weights before them and, if these are broken too, with W_0.

    Args:
        before: the state that `tokens`, int64 [1, n], were read from; `reading` is what came of it.
    """
    newest = min(tokens.shape[1], model.config.mini_batch_size)
    if newest < min(FEWEST, model.config.mini_batch_size) or not model.config.num_suffix_blocks:
        return None
    learned = _mean_nll(reading.nll, newest)
    if learned <= math.log(model.config.vocab_size) + MARGIN:
        return None
    for fast in (before.fast, begin(model).fast):
        frozen = read(model, dataclasses.replace(before, fast=fast), tokens, inner=inner, learn=False)
        cost = _mean_nll(frozen.nll, newest)
        if math.isfinite(cost) and not cost >= learned - MARGIN:
            return frozen.state
    return None


def _mean_nll(nll: Tensor, newest: int) -> float:
    """Of the newest tokens; the first token of a text has no loss."""
    nll = nll[0, -newest:].cpu()  # waits for the device once, and loads no kernels there
    return (nll[1:] if nll[0].isnan() else nll).mean().item()


class _Pauses:
    """Calls `pause` whenever a mini-batch's work has been done since it was called last, and more is to come.

    Work is parameters times tokens of a sequence, not time: so a reading always pauses in the same places.
    """

    def __init__(self, model: Transformer, pause: Callable[[], None] | None, *, learn: bool) -> None:
        self._pause = pause
        if pause is None:
            return
        self._done = 0.0
        self._upper = sum(p.numel() for p in model.upper_parameters()) + model.config.num_fast_weights
        self._lower = sum(p.numel() for block in model.prefix for p in block.parameters())
        self._lower_parts, self._upper_parts = len(model.prefix) + len(model.suffix[:1]), len(model.suffix) + 1
        self._most = model.config.mini_batch_size * (self._lower + self._upper * (STEP if learn else 1))

    def in_lower(self, tokens: int) -> Callable[[], None] | None:
        """What `Transformer.lower` calls before each of its blocks."""
        return functools.partial(self._before, self._lower * tokens / self._lower_parts) if self._pause else None

    def in_upper(self, tokens: int) -> Callable[[], None] | None:
        """What `Transformer.upper` calls before each of its blocks; to be called once more before the head."""
        return functools.partial(self._before, self._upper * tokens / self._upper_parts) if self._pause else None

    def after_lower(self, tokens: int) -> None:
        """After all of the lower half, where another thread has computed it."""
        if self._pause:
            self._before(self._lower * tokens)

    @contextlib.contextmanager
    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """While reading stands still only within such a context."""
        pause = self._pause

        def inside() -> None:
            with context():
                pause()  # type: ignore[misc]

        self._pause = pause and inside
        try:
            yield
        finally:
            self._pause = pause

    def before_passes(self, passes: int, tokens: int) -> None:
        """Before all of the upper half and the head, so many times."""
        if self._pause:
            self._before(self._upper * passes * tokens)

    def _before(self, work: float) -> None:
        if self._pause is not None and self._done >= self._most:
            self._done %= self._most
            self._pause()
        self._done += work


@dataclass
class _Reader:
    """One call of `read`: the state as it moves on, and what has been found."""

    model: Transformer
    state: ReadingState
    inner: InnerConfig
    pauses: _Pauses
    guard: bool = False
    top: int = 0
    keep_outputs: bool = False
    nll: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    refusals: list[Tensor] = field(default_factory=list)
    """Of each step, where the optimizer says it itself."""
    top_log_p: list[Tensor] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    begun: int = field(init=False)
    """Position of the first token."""

    def __post_init__(self) -> None:
        self.begun = self.state.position

    def result(self, tokens: Tensor, learn: bool, loss_mask: Tensor | None = None) -> Reading:
        """Reads the tokens [B, n]; once only."""
        if tokens.shape[1]:
            self._first(tokens[:, :1])
            if learn and self.model.config.num_suffix_blocks:
                self._learn(tokens, torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask)
            else:
                self._skim(tokens)
        empty = self.model.token_losses(self.state.hidden[:, :0], tokens[:, :0])
        norms = torch.stack(self.norms, dim=1) if self.norms else empty
        return Reading(
            self.state,
            torch.cat(self.nll, dim=1) if self.nll else empty,
            norms,
            self._refused(norms),
            (torch.cat(self.top_log_p, dim=1), torch.cat(self.top_ids, dim=1)) if self.top_ids else None,
            torch.cat(self.outputs, dim=1) if self.outputs else None,
        )

    def _first(self, token: Tensor) -> None:
        """Scores the first token [B, 1], which the state before predicts, if there is one."""
        output = self.state.output.unsqueeze(1)
        if output.shape[2]:
            self.nll.append(self.model.token_losses(output, token))
            self._look(output)
            return
        wide = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        self.nll.append(torch.full(token.shape, math.nan, device=token.device, dtype=wide))
        if self.top:
            shape = *token.shape, min(self.top, self.model.config.vocab_size)
            self.top_log_p.append(self.nll[0].new_full(shape, math.nan))
            self.top_ids.append(token.new_zeros(shape))

    def _look(self, output: Tensor) -> None:
        """Finds what is likeliest after each token of `output` [B, T, D]."""
        for part in output.split(LOGITS_AT_A_TIME, dim=1) if self.top else ():
            logits = self.model.logits(part)
            values, ids = logits.topk(min(self.top, logits.shape[-1]), dim=-1)
            self.top_log_p.append(values - logits.logsumexp(-1, keepdim=True))
            self.top_ids.append(ids)

    @functools.cached_property
    def max_step_norm(self) -> Tensor | None:
        """The limit of a guarded step; made only where one is taken."""
        return step_norm_limit(self.model) if self.guard else None

    def _refused(self, norms: Tensor) -> Tensor:
        """Which of the steps with these norms were not taken."""
        if not norms.numel() or self.max_step_norm is None:
            return torch.zeros_like(norms, dtype=torch.bool)
        if self.refusals:
            return torch.stack(self.refusals, dim=1)
        return refused(norms, lr=self.inner.lr, clip=self.inner.clip, max_step_norm=self.max_step_norm)

    def _learn(self, tokens: Tensor, mask: Tensor) -> None:
        M, n = self.model.config.mini_batch_size, tokens.shape[1]
        stretch = M * max(1, STRETCH // M) if self.state.kept is None else M
        done = 0
        while done < n:
            if replayed := self._replay(tokens[:, done:], mask[:, done:]):
                done += replayed
                continue
            if self.state.hidden.shape[1] == M:
                self._finish(tokens[:, done : done + 1], mask[:, done : done + 1])
                continue  # from here on there may be graphs
            if not self.state.hidden.shape[1]:
                self._decide()
            room = M - self.state.hidden.shape[1]
            several = room == M and n - done >= 2 * M  # else the lower half has nothing to run ahead to
            if several and (threads := threads_below(self.model, len(tokens), n - done)):
                self._learn_side_by_side(tokens[:, done:], mask[:, done:], threads)
                return
            end = min(n, done + (room if room < M else stretch))
            self._learn_from(self._lower(tokens[:, done:end]), tokens[:, done:], mask[:, done:])
            done = end

    def _learn_side_by_side(self, tokens: Tensor, mask: Tensor, threads: int) -> None:
        """Reads from the border of two mini-batches on, while so many threads run the lower half ahead."""
        stretches, done = lower_stretches(self.model, tokens, self.state.lower_pasts, self.state.start), 0
        first = next(stretches)
        with Ahead(stretches, threads) as ahead, self.pauses.within(ahead.undivided):
            for hidden, lower_pasts in itertools.chain((first,), ahead):
                self.pauses.after_lower(hidden.shape[1])
                self._move(lower_pasts=lower_pasts)
                self._learn_from(hidden, tokens[:, done:], mask[:, done:])
                done += hidden.shape[1]

    def _learn_from(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> None:
        """The upper half over a stretch [B, T, D], the first of the tokens that are still to be read: whole
        mini-batches, or what is left of one."""
        M, end, n = self.model.config.mini_batch_size, hidden.shape[1], tokens.shape[1]
        for first in range(0, end, M):
            last = min(first + M, end)
            part, following = hidden[:, first:last], slice(first + 1, last + 1)
            if last - first == M and last < n:
                self._whole(part, tokens[:, following], mask[:, following])
                continue
            known = slice(first if self.state.hidden.shape[1] else first + 1, last)
            self._part(part, tokens[:, following], tokens[:, known], mask[:, known])

    def _replay(self, tokens: Tensor, mask: Tensor | None) -> int:
        """Reads mini-batches as CUDA graphs, if they can be, without a mask frozen; returns the tokens read."""
        state, M, n = self.state, self.model.config.mini_batch_size, tokens.shape[1]
        possible = can_capture(self.model.device) and not self.top and not self.keep_outputs
        inner, limit = (None, None) if mask is None or not possible else (self.inner, self.max_step_norm)
        read = None
        if possible and state.kept is not None and n > M:
            if (keeping := kept_tokens_reader(self.model, state, inner, guard=limit is not None)) is not None:
                read = keeping.read(state, tokens, mask, limit, first=self.nll[-1][:, -1:])
        elif possible and state.kept is None and mask is not None and n >= M:
            reader = captured_reader(self.model, state, self.inner, guard=self.guard)
            read = None if reader is None else reader.read(state, tokens, mask, limit)
        self.state, *found = read or (state, [], [], [])
        for kept, new in zip((self.nll, self.norms, self.refusals), found, strict=True):
            kept += new
        return self.state.position - state.position

    def _skim(self, tokens: Tensor) -> None:
        """Reads without learning: no mini-batches, only stretches."""
        empty = self.state.hidden[:, :0]
        self._move(hidden=empty, targets=self.state.targets[:, :0], targets_mask=self.state.targets_mask[:, :0])
        stretch, first = GPU_STRETCH if tokens.is_cuda else STRETCH, 0
        while first < tokens.shape[1]:
            first += self._replay(tokens[:, first:], None)
            last = first + self._until_decision(stretch)
            self._upper(self._lower(tokens[:, first:last]), tokens[:, first + 1 : last + 1], keep=0)
            first = last

    def _until_decision(self, most: int) -> int:
        """Tokens, at most so many, to read frozen until what is kept is decided again; decides now if that is due."""
        window = self.model.config.window_size
        if self.state.kept is None:
            return most
        if undecided(self.model, self.state.kept) >= window:
            self._decide()
        return min(most, window - undecided(self.model, self.state.kept))

    def _decide(self) -> None:
        """Where a mini-batch begins: which tokens are kept while it is read."""
        state = self.state
        if state.kept is not None:
            self._move(kept=decided(self.model, state.kept, state.lower_pasts, state.upper_pasts, state.start))

    def _remembered(self, tokens: int) -> Kept | None:
        """What is kept, after so many tokens more, which have been scored."""
        state = self.state
        if state.kept is None:
            return None
        known = torch.cat(self.nll, dim=1)[:, state.position - self.begun :]
        return state.kept.after(known[:, :tokens])

    def _seen(
        self, pasts: tuple[MixerPast, ...], tokens: int, start: int | Tensor, *, lower: bool = False
    ) -> tuple[MixerPast, ...]:
        """These pasts, and what is kept beside them, as so many tokens from `start` on see it."""
        state = self.state
        if state.kept is None:
            return pasts
        return long_pasts(self.model, state.kept, pasts, lower=lower, position=state.start, start=start, tokens=tokens)

    def _move(self, **changes: object) -> None:
        self.state = dataclasses.replace(self.state, **changes)  # type: ignore[arg-type]

    def _lower(self, tokens: Tensor) -> Tensor:
        pause, start = self.pauses.in_lower(tokens.shape[1]), self.state.start
        pasts = self._seen(self.state.lower_pasts, tokens.shape[1], start, lower=True)
        hidden, own = self.model.lower(tokens, pasts, start=start, pause=pause)
        self._move(lower_pasts=self.model.advance(self.state.lower_pasts, own, 0))
        return hidden

    def _upper(self, hidden: Tensor, targets: Tensor, keep: int, run: Recorded | None = None) -> None:
        """Scores tokens with the weights as they are; the pasts keep the window and `keep` tokens more."""
        state, model, pause = self.state, self.model, self.pauses.in_upper(hidden.shape[1])
        if run is None:
            pasts = self._seen(state.upper_pasts, hidden.shape[1], state.start)
            output, own = model.upper(hidden, state.fast, pasts, start=state.start, order=0, pause=pause)
            if pause is not None:
                pause()
        else:
            output, own = run.output.detach(), tuple(made.detach() for made in run.own)
        self.outputs += [output] if self.keep_outputs else []
        if targets.shape[1]:
            self.nll.append(model.token_losses(output[:, : targets.shape[1]], targets))
            self._look(output[:, : targets.shape[1]])
        self._move(
            **state.moved(hidden.shape[1]),
            kept=self._remembered(hidden.shape[1]),
            upper_pasts=model.advance(state.upper_pasts, own, model.num_lower_attentions, extra=keep),
            output=output[:, -1],
            run=run,
        )

    def _part(self, hidden: Tensor, following: Tensor, known: Tensor, known_mask: Tensor) -> None:
        """Some tokens of a mini-batch whose step must wait, the tokens that follow each, and the new targets."""
        state = self.state
        waiting = torch.cat((state.hidden, hidden), dim=1)
        # on a GPU memory is dearer than a second run
        whole = hidden.shape[1] == self.model.config.mini_batch_size and not hidden.is_cuda
        run = None
        if whole:
            self.pauses.before_passes(1, hidden.shape[1])
            carry = Carry(state.fast, self._seen(state.upper_pasts, hidden.shape[1], state.start))
            run = recorded(self.model, carry, waiting, start=state.start)
        self._move(
            hidden=waiting,
            targets=torch.cat((state.targets, known), dim=1),
            targets_mask=torch.cat((state.targets_mask, known_mask), dim=1),
        )
        self._upper(hidden, following, keep=self.state.hidden.shape[1], run=run)

    def _finish(self, target: Tensor, mask: Tensor) -> None:
        """The step on an unfinished mini-batch, whose last target has come."""
        model, state, M = self.model, self.state, self.state.hidden.shape[1]
        self.pauses.before_passes(STEP - 1, M)
        before, start = tuple(past.before(M) for past in state.upper_pasts), state.start - M
        run = state.run
        if run is not None and not run.is_of(model, state.fast, state.hidden):
            run = None
        update = finish(
            model,
            Carry(state.fast, self._seen(before, M, start)),
            state.hidden,
            torch.cat((state.targets, target), dim=1),
            torch.cat((state.targets_mask, mask), dim=1),
            position=state.position - M,
            start=start,
            inner=self.inner,
            max_step_norm=self.max_step_norm,
            run=run,
        )
        own = tuple(past.last(M) for past in state.upper_pasts)
        self._move(
            hidden=state.hidden[:, :0], targets=state.targets[:, :0], targets_mask=state.targets_mask[:, :0], run=None
        )
        self._stepped(from_matrices(update.weights), before, own, update.grad_norm, update.refused)

    def _whole(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> None:
        """A mini-batch that came with all its targets: scored and learned from in one pass."""
        state, M = self.state, hidden.shape[1]
        self.pauses.before_passes(STEP, M)
        step = inner_step(
            self.model,
            Carry(state.fast, self._seen(state.upper_pasts, M, state.start)),
            hidden,
            targets,
            mask,
            start=state.start,
            lr=self.inner.lr,
            clip=self.inner.clip,
            order=0,
            surprise=self.inner.surprise,
            max_step_norm=self.max_step_norm,
            optimizer=optimizer_named(self.inner.optimizer),
        )
        self._stepped(step.fast, state.upper_pasts, step.own, step.grad_norm, step.refused)
        self.nll.append(step.nll)
        self._move(**state.moved(M), kept=self._remembered(M))  # a token follows, and with it the output
        self.outputs += [step.output] if self.keep_outputs else []
        self._look(step.output)

    def _stepped(
        self,
        fast: FastWeights,
        before: tuple[MixerPast, ...],
        own: tuple[MixerPast, ...],
        grad_norm: Tensor,
        refused: Tensor | None,
    ) -> None:
        """Books a step on a mini-batch with these keys and values; `before` is the window before its tokens."""
        self.norms.append(grad_norm)
        self.refusals += [] if refused is None else [refused]
        self._move(fast=fast, upper_pasts=self.model.advance(before, own, self.model.num_lower_attentions))
