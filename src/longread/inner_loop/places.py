"""Where sequences are decoded together: each has a lane, and a token changes it in place.

Sequences come and go, and are at positions of their own. New keys and values go into rings, the fast weights lie there
in the type of the products, and on a GPU the pass for one token of every lane is one replay of a CUDA graph.

A sequence whose mini-batch is complete takes the inner step where it is, by itself, once its next token is known; then
that token is read with those of all others.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.finishing import finish
from longread.inner_loop.graphs import CheckedGraphs, put_back_later
from longread.inner_loop.state import ReadingState, StateFacts
from longread.inner_loop.step import Carry, from_matrices, matrices, step_norm_limit
from longread.model import FastWeights, Past, Ring, Transformer, can_capture, decode
from longread.ops.clipped_sgd import refused
from longread.ops.fusible import is_on_a_gpu, without_kernels
from longread.ops.likeliest import likeliest

SPARE = 1024
"""Tokens for which attention without a window gets room, a power of 2, or about a 48th of what it holds."""
TOLERANCE = 0.05
"""Difference of logits, as a share of their spread, above which a captured pass is not used."""

KERNELS_OFF = {2: 0.1, 4: 0.01}
"""By bytes of a number: L2 difference of logits from plain PyTorch's, as a share of their norm, above which kernels are
not used. Sums in another order give up to 0.03 in bfloat16."""
LOG_P_OFF = 1e-4
"""Difference of log-probabilities above which they are not used either, in nats and as a share; ids must be equal."""


class KernelsRefused(UserWarning):
    """Kernels of decoding compute something else than plain PyTorch; they are not used."""


class LikeliestTokens:
    """Of so many lanes the likeliest token and its log-probability, on their way to the host as soon as they are known.

    Each has a fixed address, there too.
    """

    def __init__(self, logits: Tensor) -> None:
        lanes, gpu = len(logits), logits.is_cuda
        self._found = torch.zeros(lanes, dtype=torch.long, device=logits.device), torch.zeros_like(logits[:, 0])
        self._on_host = [torch.zeros(lanes, dtype=x.dtype, pin_memory=gpu) for x in self._found]
        self._arrived = torch.cuda.Event() if gpu else None
        self._sent = 0

    def find(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Looks at the logits of the first lanes, [count, V]; the device is not waited for."""
        found = likeliest(logits)
        for place, x in zip(self._found, found, strict=True):
            place[: len(x)].copy_(x)
        return found

    def send(self, count: int) -> None:
        """Lets what was found of the first `count` lanes go to the host."""
        for place, x in zip(self._on_host, self._found, strict=True):
            place[:count].copy_(x[:count], non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._found[0].device))
        self._sent = count

    def forget(self) -> None:
        """Logits have changed since."""
        self._sent = 0

    def wait(self, logits: Tensor) -> list[tuple[int, float]]:
        """Those of the first lanes, whose logits these are, [count, V]."""
        count = len(logits)
        if count > self._sent:
            self.find(logits)
            self.send(count)
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, log_p = (x[:count].tolist() for x in self._on_host)
        return list(zip(ids, log_p, strict=True))


class _BeforeStep(NamedTuple):
    """What an inner step and the token after it change of the state of B sequences."""

    fast: FastWeights
    hidden: Tensor
    """Of the mini-batch's first token, [B, D]: the token after it takes its place."""
    counts: Tensor


@dataclass
class _Occupant:
    """Facts about the sequences in some lanes without asking the device."""

    position: int
    waiting: int
    """Tokens of the unfinished mini-batch."""
    learn: bool
    fast: FastWeights
    """As they came, or as the last step has made them; float32 or wider."""
    before: _BeforeStep | None = None
    """While the token after a step has not been read: it is the step's last target, and without it there is no step."""


class Places:
    """Lanes for `lanes` sequences; everything that a CUDA graph reads or writes has a fixed address.

    Args:
        learn: whether sequences may come that learn; they look back further.
    """

    def __init__(self, model: Transformer, lanes: int, *, learn: bool) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        self._model = weakref.ref(model)  # who keeps places would keep the model alive otherwise
        self.lanes = lanes
        learn = learn and config.num_suffix_blocks > 0
        self._extra = config.mini_batch_size if learn else 0  # how much more than a window the inner step looks back
        self._graphs = CheckedGraphs[Tensor](
            device,
            compared=lambda logits: logits,
            scale=Tensor.std,
            tolerance=TOLERANCE,
            warning="a captured pass gives logits {:.2g} off; decoding goes on without",
        )
        self._kernels, self._compared = True, set[int]()
        self._occupants: list[_Occupant | None] = [None] * lanes
        room = self._extra + 1  # a lane that nobody is in writes into the last column
        self._frequencies = model.frequencies()
        self._tokens = torch.zeros(lanes, dtype=torch.long, device=device)
        self._position = torch.zeros(lanes, dtype=torch.long, device=device)
        self._slot = torch.zeros(lanes, dtype=torch.long, device=device)
        self._learning = torch.zeros(lanes, dtype=torch.long, device=device)
        self._hidden = torch.zeros(lanes, room, config.width, device=device, dtype=dtype)
        self._read = torch.zeros(lanes, room, dtype=torch.long, device=device)
        self._counts = torch.zeros(lanes, room, dtype=torch.bool, device=device)
        self._output = torch.zeros(lanes, config.width, device=device, dtype=dtype)
        self._logits = model.logits(self._output)
        self._likeliest = LikeliestTokens(self._logits)
        initial = matrices(model.initial_fast_weights(lanes))
        self._working = [torch.empty(w.shape, device=device, dtype=dtype) for w in initial]
        self._rings: list[Ring] = []
        self._room = 0  # slots of attention without a window
        self._make_room(0)

    @property
    def model(self) -> Transformer:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these places is gone")
        return model

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        rings = [x for ring in self._rings for x in ring[:2]]
        return sum(x.nbytes for x in (*rings, *self._working, self._hidden, self._logits))

    def logits(self, count: int) -> Tensor:
        """Of the next token of the first `count` lanes, [count, V], float32 or wider; later calls overwrite them."""
        return self._logits[:count]

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The likeliest next token of each of the first `count` lanes, and its log-probability.

        On a GPU a pass finds them, and only its end is waited for.
        """
        with self._trusted():
            return self._likeliest.wait(self._logits[:count])

    def due(self, lane: int) -> bool:
        """Whether the sequence's mini-batch is complete: it must `step` before its next token is read."""
        occupant = self._occupants[lane]
        return occupant is not None and occupant.learn and occupant.waiting == self._extra

    def put(self, lane: int, state: ReadingState, *, learn: bool) -> None:
        """Lets the B sequences of `state`, which have read something, go on in lanes lane … lane + B − 1.

        The state may be on another device.
        """
        learn, device = learn and self._extra > 0, self._output.device
        fast = from_matrices([w.to(device) for w in matrices(state.fast)])
        B, m = state.output.shape[0], state.hidden.shape[1] if learn else 0
        here = slice(lane, lane + B)
        self._make_room(state.position, anew=self.lanes == B)
        for ring, past in zip(self._rings, (*state.lower_pasts, *state.upper_pasts), strict=True):
            own = _part(ring, here)
            for x in own[:2]:  # what is not visible is multiplied by 0, and 0 times another's infinity is no number
                x.zero_()
            own.put(Past(*(x.to(device) for x in past.last(ring.key.shape[2]))), state.position)
        for place, w in zip(self._working, matrices(fast), strict=True):
            place[here].copy_(w)
        if m:
            self._hidden[here, :m].copy_(state.hidden)
            self._read[here, 1:m].copy_(state.targets)
            self._counts[here, 1:m].copy_(state.targets_mask)
        self._counts[here, m:] = True
        self._slot[here] = m
        self._learning[here] = int(learn)
        self._position[here] = state.position
        self._output[here].copy_(state.output)
        self._logits[here].copy_(self.model.logits(self._output[here]))
        self._likeliest.forget()
        self._occupants[lane] = _Occupant(state.position, m, learn, fast)

    def take(self, lane: int, count: int = 1, device: torch.device | None = None) -> ReadingState:
        """The state, as a value, of the `count` sequences that came together into the lanes from `lane` on.

        On another `device` it arrives tensor by tensor, and takes no more than one of them where it comes from.
        """
        self.take_back(lane)
        occupant = self._occupant(lane)
        here, m, position, split = slice(lane, lane + count), occupant.waiting, occupant.position, self._split
        pasts = []
        for ring, kept in zip(self._rings, self._past_lengths(occupant), strict=True):
            pasts.append(Past(*(x.to(device) for x in _part(ring, here).take(kept, position))))
        return ReadingState(
            position=position,
            fast=from_matrices([w.to(device) for w in matrices(occupant.fast)]),
            lower_pasts=tuple(pasts[:split]),
            upper_pasts=tuple(pasts[split:]),
            hidden=self._hidden[here, :m].clone().to(device),
            targets=self._read[here, 1 : max(1, m)].clone().to(device),
            targets_mask=self._counts[here, 1 : max(1, m)].clone().to(device),
            output=self._output[here].clone().to(device),
        )

    def facts(self, lane: int, count: int = 1) -> StateFacts:
        """What the state is that `take` would give; nothing is copied."""
        occupant = self._occupant(lane)
        m = occupant.waiting
        tokens = 2 * sum(
            kept * ring.key.shape[1] * ring.key.shape[3] * ring.key.element_size()
            for ring, kept in zip(self._rings, self._past_lengths(occupant), strict=True)
        )
        known = max(0, m - 1) * (self._read.element_size() + self._counts.element_size())
        vectors = (m + 1) * self._output.shape[1] * self._output.element_size()
        nbytes = count * (tokens + known + vectors) + sum(w.nbytes for w in matrices(occupant.fast))
        return StateFacts(occupant.position, m, occupant.fast, nbytes)

    def leave(self, lane: int) -> None:
        """Makes a lane empty."""
        self._occupants[lane] = None

    def move(self, origin: int, lane: int) -> None:
        """Moves one sequence into another lane."""
        rings = [x for ring in self._rings for x in ring[:2]]
        for x in (*rings, *self._working, self._hidden, self._read, self._counts, self._output, self._logits):
            x[lane].copy_(x[origin])
        for x in (self._position, self._slot, self._learning):
            x[lane] = x[origin]
        self._occupants[lane], self._occupants[origin] = self._occupants[origin], None
        self._likeliest.forget()

    def resize(self, lanes: int) -> None:
        """Adds empty lanes, or takes the last away, which must be empty.

        Tensor by tensor, so it takes little more memory than there is before or afterwards.
        """
        for name in _PER_LANE:
            setattr(self, name, _resized(getattr(self, name), lanes))
        for i in range(len(self._working)):
            self._working[i] = _resized(self._working[i], lanes)
        for i in range(len(self._rings)):
            key = _resized(self._rings[i].key, lanes)
            self._rings[i] = Ring(key, self._rings[i].value, self._position)
            self._rings[i] = Ring(key, _resized(self._rings[i].value, lanes), self._position)
        self._occupants = [*self._occupants, *[None] * (lanes - self.lanes)][:lanes]
        self.lanes = lanes
        self._likeliest = LikeliestTokens(self._logits)
        self._graphs.clear()

    @torch.no_grad()
    def step(self, lane: int, tokens: Tensor, inner: InnerConfig) -> Tensor:
        """Takes the inner step, guarded, of the sequences that came together into the lanes from `lane` on and are due.

        Until the tokens have been read the state that `take` gives is the one before.

        Args:
            tokens: that come next, int64 [B], on any device: the last targets. They are not read.

        Returns:
            which of them refused it, bool [B].
        """
        occupant, model, M, split = self._occupant(lane), self.model, self._extra, self._split
        here, first = slice(lane, lane + len(tokens)), occupant.position - M
        before = [
            _part(ring, here).take(first if window is None else min(first, window), first)
            for ring, (window, _) in zip(self._rings[split:], self._windows()[split:], strict=True)
        ]
        last, limit = tokens.to(self._read.device).unsqueeze(1), step_norm_limit(model)
        found = finish(
            model,
            Carry(occupant.fast, tuple(before)),
            self._hidden[here, :M],
            torch.cat((self._read[here, 1:M], last), dim=1),
            self._counts[here, 1:],
            position=first,
            start=first,
            inner=inner,
            max_step_norm=limit,
        )
        occupant.before = _BeforeStep(occupant.fast, self._hidden[here, 0].clone(), self._counts[here].clone())
        for place, w in zip(self._working, found.weights, strict=True):
            place[here].copy_(w)
        occupant.fast, occupant.waiting = from_matrices(found.weights), 0
        self._slot[here] = 0
        self._counts[here] = True
        if found.refused is not None:
            return found.refused
        return refused(found.grad_norm, lr=inner.lr, clip=inner.clip, max_step_norm=limit)

    @torch.no_grad()
    def take_back(self, lane: int) -> None:
        """Undoes the step of the sequences in the lanes from `lane` on, if the token after it has not been read."""
        occupant = self._occupant(lane)
        if occupant.before is None:
            return
        (fast, hidden, counts), here = occupant.before, slice(lane, lane + len(occupant.before.hidden))
        for place, w in zip(self._working, matrices(fast), strict=True):
            place[here].copy_(w)
        self._hidden[here, 0].copy_(hidden)
        self._counts[here].copy_(counts)
        self._slot[here] = self._extra
        occupant.fast, occupant.waiting, occupant.before = fast, self._extra, None

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Reads one token of each of the first lanes, int64 [lanes], on any device; none of them may be due."""
        count = len(tokens)
        present = [occupant for occupant in self._occupants[:count] if occupant is not None]
        self._make_room(max(occupant.position for occupant in present))
        self._tokens[:count].copy_(tokens, non_blocking=True)
        width = min(self.lanes, 1 << (count - 1).bit_length()) if self._graphs.usable else count
        if self._kernels and width not in self._compared and can_capture(self._output.device):
            self._compare(width)
        with self._trusted():
            self._graphs.run(width, functools.partial(self._pass, width), kept=self._kept)
        self._likeliest.forget()
        if can_capture(self._output.device):
            self._likeliest.send(count)
        for occupant in present:
            occupant.position += 1
            occupant.waiting += occupant.learn
            occupant.before = None

    def _compare(self, width: int) -> None:
        """Does without kernels from now on if those of a pass of so many lanes are wrong on this device."""
        self._compared.add(width)
        undo = self._kept()
        with without_kernels():
            plain = self._pass(width).clone()
        undo()
        try:
            difference = self._pass(width) - plain
            with without_kernels():
                expected = likeliest(self._logits[:width])
            found = self._likeliest.find(self._logits[:width])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that this device or compiler does not take
            self._refuse_kernels(f"do not run ({error})")
            return
        finally:
            undo()
        lanes = [lane for lane in range(width) if self._occupants[lane] is not None]
        there = plain[lanes].isfinite()  # a padded vocabulary has infinities
        size, off = (x[lanes].where(there, 0.0).norm().item() for x in (plain, difference))
        if not off <= KERNELS_OFF.get(self._output.element_size(), 0.0) * size:
            self._refuse_kernels(f"give logits {off:.2g} off, whose norm is {size:.2g}")
        elif not all(map(_close, found, expected)):
            self._refuse_kernels("find other tokens likeliest")

    def _trusted(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._kernels else without_kernels()

    def _refuse_kernels(self, reason: str) -> None:
        self._kernels = False
        warnings.warn(f"kernels of decoding {reason}; it goes on in plain PyTorch", KernelsRefused, stacklevel=4)

    def _occupant(self, lane: int) -> _Occupant:
        occupant = self._occupants[lane]
        if occupant is None:
            raise LookupError(f"nobody is in lane {lane}")
        return occupant

    def _past_lengths(self, occupant: _Occupant) -> list[int]:
        """Of each attention, how many tokens a state has of these sequences."""
        position, m = occupant.position, occupant.waiting
        return [
            position if window is None else min(position, window + min(m, extra)) for window, extra in self._windows()
        ]

    @property
    def _split(self) -> int:
        return self.model.num_lower_attentions

    def _windows(self) -> list[tuple[int | None, int]]:
        """Of each attention: its window, and what must be kept beyond it."""
        config, split = self.model.config, self._split
        return [(config.window_of(i), 0 if i < split else self._extra) for i in range(config.num_blocks)]

    def _kept(self) -> Callable[[], None]:
        """The undoing of a pass; its token gets the same places again, in which it hides nothing of the state."""
        return put_back_later(self._position, self._slot, self._output, self._logits)

    def _pass(self, count: int) -> Tensor:
        """Reads a token of each of the first `count` lanes; returns `logits(count)`."""
        here = slice(count)
        model, tokens, slot, start = self.model, self._tokens[here], self._slot[here], self._position[here]
        rings, fast = [_part(ring, here) for ring in self._rings], from_matrices([w[here] for w in self._working])
        hidden, output = decode(model, tokens, fast, rings, start=start, frequencies=self._frequencies)
        if self._extra:
            self._hidden[here].scatter_(1, slot[:, None, None].expand(-1, 1, hidden.shape[1]), hidden.unsqueeze(1))
            self._read[here].scatter_(1, slot[:, None], tokens[:, None])
        logits = model.logits(output)
        self._output[here].copy_(output)  # only now: a pass that fails leaves the state as it was
        self._logits[here].copy_(logits)
        start += 1
        slot.add_(self._learning[here]).clamp_(max=self._extra)
        if is_on_a_gpu(self._logits):
            self._likeliest.find(self._logits[here])
        return self._logits[here]

    def _make_room(self, position: int, *, anew: bool = False) -> None:
        """Makes the rings, or larger ones where attention without a window has no room for a token at `position`.

        With `anew` what they hold is of no use any more, and they get the room of a token at `position`, no more: what
        sequences that have all lanes give does not depend on those that were there before.
        """
        slots = room(position)
        if self._rings and (slots <= self._room if not anew else slots == self._room):
            return  # looking at every ring would take as long as a small model's token
        self._room = slots
        config, like = self.model.config, self._output
        for i, (window, extra) in enumerate(self._windows()):
            older = self._rings[i] if i < len(self._rings) else None
            slots = self._room if window is None else window + extra
            held = 0 if older is None else older.key.shape[2]
            if held == slots or (held > slots and not anew):
                continue
            shape = like.shape[0], config.num_kv_heads, slots, config.head_dim
            ring = Ring(like.new_zeros(shape), like.new_zeros(shape), self._position)
            if older is None:
                self._rings.append(ring)
                continue
            if not anew:
                for place, x in zip(ring[:2], older[:2], strict=True):  # without a window, token p lies in slot p
                    place[:, :, :held].copy_(x)
            self._rings[i] = ring
            self._graphs.clear()


def place_nbytes(model: Transformer, position: int) -> int:
    """Bytes of a lane for a session of a token at `position`. For a model on the meta device, where nothing is made."""
    places = Places(model, 1, learn=True)
    places._make_room(position)
    return places.nbytes


def room(position: int) -> int:
    """Slots of attention without a window for a token at `position`, more than that.

    The same however a sequence came there: softmax and products over more slots, even empty ones, sum in another order.
    """
    step = max(SPARE, (1 << position.bit_length()) // 64)
    return (position // step + 1) * step


_PER_LANE = ("_tokens", "_position", "_slot", "_learning", "_hidden", "_read", "_counts", "_output", "_logits")


def _resized(x: Tensor, lanes: int) -> Tensor:
    if lanes < len(x):
        return x[:lanes].clone()
    resized = x.new_zeros(lanes, *x.shape[1:])
    resized[: len(x)] = x
    return resized


def _close(found: Tensor, expected: Tensor) -> bool:
    """Of ids and log-probabilities."""
    return torch.allclose(found, expected, rtol=LOG_P_OFF * found.is_floating_point(), atol=LOG_P_OFF, equal_nan=True)


def _part(ring: Ring, lanes: slice) -> Ring:
    return Ring(*(x[lanes] for x in ring))
