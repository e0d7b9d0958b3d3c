"""Reading with tokens kept on a GPU, as replays of one CUDA graph: all of the network over one mini-batch.

Once the window is full and as many tokens are kept as may be, each mini-batch is the same computation on tensors of the
same shapes: what is kept is decided, both halves read, the step is taken. The state lies in place, and the graph ends
by writing the next one over it. Launched one by one these are some two thousand kernels a mini-batch.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.captured import SHARE, TOLERANCE, WORTH, no_inference_mode, place_of
from longread.inner_loop.graphs import CheckedGraphs, put_back_later
from longread.inner_loop.kept import Kept, decided, long_pasts, undecided
from longread.inner_loop.optimizers import Update, optimizer_named
from longread.inner_loop.state import ReadingState, copied
from longread.inner_loop.step import from_matrices, inner_gradient, matrices
from longread.model import LongPast, Past, Transformer, free_bytes

COPIES = 4
"""Of a state, about, that a reader takes: in place, the next one before it is written there, and what lies between."""
READERS = 4
"""Of a model that are kept, those used last."""


class _MiniBatch(NamedTuple):
    """A mini-batch: −log p of the token after each of its tokens, [B, M]; these and the logarithms of the norms of all
    that the state holds then; of its step, if it took one, the norm of the gradient and, where the optimizer says it,
    whether it was refused, [B]."""

    nll: Tensor
    checked: Tensor
    grad_norm: Tensor | None
    refused: Tensor | None


class KeptTokensReader:
    """Reads B sequences, whole mini-batches of them, from states of one shape."""

    def __init__(self, model: Transformer, state: ReadingState, inner: InnerConfig | None, guard: bool) -> None:
        B, M, device = state.output.shape[0], model.config.mini_batch_size, model.device
        self._model, self._inner = weakref.ref(model), inner
        self._graphs = CheckedGraphs[_MiniBatch](
            device,
            compared=lambda found: found.checked,
            scale=lambda plain: 1.0,
            tolerance=TOLERANCE,
            warning="captured mini-batches give scores or a state that are {:.2g} off; reading goes on without",
        )
        self._positions = torch.zeros(B, dtype=torch.long, device=device)
        self._state = dataclasses.replace(copied(state), positions=self._positions)
        self._working = [w.to(model.dtype) for w in matrices(self._state.fast)]
        self._tokens, self._targets = (torch.zeros(B, M, dtype=torch.long, device=device) for _ in range(2))
        self._mask = torch.ones(B, M, dtype=torch.bool, device=device)
        self._first = _kept_of(self._state).nll.new_zeros(B, 1)
        self._max_step_norm = torch.zeros((), device=device) if guard else None
        self._runs = 0
        self.place = place_of(model)
        self._lock = threading.Lock()

    @property
    def usable(self) -> bool:
        """False once the graph has turned out to compute something else."""
        return self._graphs.usable

    def read(
        self,
        state: ReadingState,
        tokens: Tensor,
        mask: Tensor | None,
        max_step_norm: Tensor | None,
        *,
        first: Tensor,
    ) -> tuple[ReadingState, list[Tensor], list[Tensor], list[Tensor]]:
        """Reads as many mini-batches of the tokens [B, n], n > M, as know the token after them.

        Args:
            mask: which tokens are targets of the steps; a frozen reader needs none.
            max_step_norm: limit of a step for a reader with a guard (see `longread.ops.clipped_sgd`).
            first: what the first token cost, [B, 1].

        Returns:
            the state after them, but for `output`, which is that before; the nll of the tokens that follow each of
            theirs, the norms of the steps' gradients, and which steps were refused, where the optimizer says it.
        """
        M = self._tokens.shape[1]
        count = (tokens.shape[1] - 1) // M
        with self._lock, no_inference_mode():
            self._load(state, first, max_step_norm)
            found = []
            for i in range(count):
                here, following = slice(i * M, (i + 1) * M), slice(i * M + 1, (i + 1) * M + 1)
                self._tokens.copy_(tokens[:, here])
                self._targets.copy_(tokens[:, following])
                if mask is not None:
                    self._mask.copy_(mask[:, following])
                found.append(self._mini_batch(count - i))
            after = dataclasses.replace(copied(self._state), **state.moved(count * M), output=state.output)
        norms = [one.grad_norm for one in found if one.grad_norm is not None]
        return after, [one.nll for one in found], norms, [one.refused for one in found if one.refused is not None]

    def _load(self, state: ReadingState, first: Tensor, max_step_norm: Tensor | None) -> None:
        for place, x in zip(_all_of(self._state), _all_of(state), strict=True):
            place.copy_(x)
        for copy, w in zip(self._working, matrices(state.fast), strict=True):
            copy.copy_(w)
        self._positions.copy_(torch.as_tensor(state.start))
        self._first.copy_(first)
        if self._max_step_norm is not None and max_step_norm is not None:
            self._max_step_norm.copy_(max_step_norm)

    def _mini_batch(self, runs: int) -> _MiniBatch:
        """The next one, of so many that follow each other: plainly, or by the graph once that pays."""
        self._runs += 1
        if self._runs + runs - 1 < WORTH:
            found = self._run()
        else:
            changed = (*_all_of(self._state), *self._working, self._positions, self._first)
            found = self._graphs.run("mini-batch", self._run, kept=lambda: put_back_later(*changed))
        return _MiniBatch(*(None if x is None else x.clone() for x in found))  # type: ignore[arg-type]

    def _run(self) -> _MiniBatch:
        state, model = self._state, self._model()
        if model is None:
            raise ReferenceError("the model of this reader is gone")
        M, start = self._tokens.shape[1], self._positions
        kept = decided(model, _kept_of(state), state.lower_pasts, state.upper_pasts, start)  # type: ignore[arg-type]

        def seen(pasts: Sequence[Past], *, lower: bool) -> tuple[LongPast, ...]:
            return long_pasts(model, kept, pasts, lower=lower, position=start, start=start, tokens=M)

        hidden, lower = model.lower(self._tokens, seen(state.lower_pasts, lower=True), start=start)
        pasts = seen(state.upper_pasts, lower=False)
        if self._inner is not None:
            step = inner_gradient(
                model,
                [w.detach().requires_grad_() for w in self._working],
                pasts,  # type: ignore[arg-type]
                hidden,
                self._targets,
                self._mask,
                start=start,
                order=0,
                surprise=self._inner.surprise,
            )
            nll, upper = step.nll, step.own
            update: Update | None = optimizer_named(self._inner.optimizer).step_(
                matrices(state.fast),
                step.gradients,
                self._working,
                lr=self._inner.lr,
                clip=self._inner.clip,
                max_step_norm=self._max_step_norm,
            )
        else:
            output, upper = model.upper(hidden, from_matrices(self._working), pasts, start=start, order=0)
            nll = model.token_losses(output, self._targets)
            update = None
        after = dataclasses.replace(
            state,
            lower_pasts=model.advance(state.lower_pasts, lower, 0),
            upper_pasts=model.advance(state.upper_pasts, upper, model.num_lower_attentions),
            kept=kept.after(torch.cat((self._first, nll[:, :-1].to(self._first.dtype)), dim=1)),
        )
        stepped = len(matrices(state.fast))  # in place
        torch._foreach_copy_(_all_of(state)[stepped:], _all_of(after)[stepped:])
        self._first.copy_(nll[:, -1:])
        self._positions += M
        floats = [x for x in _all_of(state) if x.is_floating_point()]
        sizes = torch.stack([size.float() for size in torch._foreach_norm(floats)])
        checked = torch.cat((nll.float().flatten(), sizes.clamp(min=1e-10).log()))
        return _MiniBatch(nll, checked, *((update.grad_norm, update.refused) if update else (None, None)))


def _all_of(state: ReadingState) -> list[Tensor]:
    """All that changes from mini-batch to mini-batch where none is unfinished; fast weights first."""
    pasts = [x for past in (*state.lower_pasts, *state.upper_pasts) for x in past]
    return [*matrices(state.fast), *pasts, *_kept_of(state).tensors]


def _kept_of(state: ReadingState) -> Kept:
    if state.kept is None:
        raise ValueError("the state keeps nothing")
    return state.kept


_READERS: weakref.WeakKeyDictionary[Transformer, dict[Hashable, KeptTokensReader]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def kept_tokens_reader(
    model: Transformer, state: ReadingState, inner: InnerConfig | None, *, guard: bool
) -> KeptTokensReader | None:
    """A reader that can go on from `state`, for a device with CUDA graphs; None amid a mini-batch, before the window is
    full and all is kept that may be, and where memory is short.

    Args:
        inner: of the steps; None: it reads frozen.
    """
    config, kept = model.config, _kept_of(state)
    full = undecided(model, kept) == config.window_size and kept.position.shape[1] == config.kept_tokens
    lengths = {past.key.shape[2] for past in (*state.lower_pasts, *state.upper_pasts)}  # type: ignore[union-attr]
    if not full or state.hidden.shape[1] or lengths != {config.window_size}:
        return None
    with _LOCK, no_inference_mode():  # else threads that come at once would each make one
        readers, key = _READERS.setdefault(model, {}), (state.output.shape[0], model.dtype, inner, guard)
        reader = readers.pop(key, None)
        if reader is None or reader.place != place_of(model):
            if state.nbytes * COPIES * SHARE > free_bytes(model.device):
                return None
            reader = KeptTokensReader(model, state, inner, guard)
        readers[key] = reader
        if len(readers) > READERS:
            del readers[next(iter(readers))]
        return reader if reader.usable else None
