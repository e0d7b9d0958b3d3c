"""One token after the other: the state lies in places that a token changes in place.

A token costs one pass through the network, for which `read` would copy every window. When a mini-batch is complete, the
inner step is taken in its place, and with the new fast weights the next token is read as any other.

A model that does not decode in place (`ModelConfig.decodes_in_place`) is read by `read` alone.

A decoder owns its places while it works, so nobody else's token disturbs it. They are nobody else's then, and go with
it. Places at rest are in the pool of their model. It keeps few: making them costs time, on a GPU that of capturing
graphs, and keeping them the memory of a session. A decoder may rest in them with its texts, and goes on without copying
anything. Only when as many rest as are kept does who comes next make the oldest move out, which copies windows and
changes no result: what rests in places has its windows nowhere else, so places of one's own take hardly more memory
than moving another out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.places import Places
from longread.inner_loop.reading import read
from longread.inner_loop.state import ReadingState, StateFacts, apart, next_token_logits, shapes_of, together
from longread.model import Transformer
from longread.ops.likeliest import likeliest

KEPT = 2
"""Most sets of places that rest beside a model."""


@dataclass(eq=False)
class Text:
    """The sequences of one state, as a decoder goes on with them."""

    lanes: slice
    position: int
    """Tokens read."""
    rolled_back: Tensor
    """How many of its inner steps, of all its sequences together, were refused, int64 []."""
    state: ReadingState | None
    """None while it is in the places."""
    steps: int = 0
    """Inner steps that it came to."""
    last_logits: Tensor | None = None
    """Of its next tokens, where it is not gone on with."""

    @property
    def size(self) -> int:
        return self.lanes.stop - self.lanes.start


class Decoder:
    """Sequences that go on from one state, or each from its own, a token at a time.

    Args:
        state: of at least one token; several of them are of one sequence each, at any positions.
        learn: False reads with the weights as they are, as in `longread.inner_loop.read`.
    """

    def __init__(
        self,
        model: Transformer,
        state: ReadingState | Sequence[ReadingState],
        inner: InnerConfig,
        *,
        learn: bool = True,
    ) -> None:
        self.model, self.inner, self.learn = model, inner, learn and model.config.num_suffix_blocks > 0
        self.texts: list[Text] = []
        """One for each state that was given, in their order."""
        lane = 0
        for one in [state] if isinstance(state, ReadingState) else state:
            lanes = slice(lane, lane + len(one.output))
            refused = torch.zeros((), dtype=torch.long, device=one.output.device)
            self.texts.append(Text(lanes, one.position, refused, one if self.learn else _without_waiting(one)))
            lane = lanes.stop
        self._lanes = lane
        self._has_places = model.config.decodes_in_place
        self._pooled: PooledPlaces | None = None  # while it works

    @property
    def position(self) -> int:
        """Tokens read, of the first text."""
        return self.texts[0].position

    @property
    def steps(self) -> int:
        """Inner steps that the first text came to."""
        return self.texts[0].steps

    @property
    def rolled_back(self) -> Tensor:
        """Those of them, of all its sequences together, that were refused."""
        return self.texts[0].rolled_back

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token of every sequence, [B, V], float32 or wider."""
        if not self._has_places:
            return torch.cat([next_token_logits(self.model, _of(text)) for text in self.texts])
        logits = self._places().logits(self._lanes).clone()
        for text in self.texts:
            if text.last_logits is not None:
                logits[text.lanes] = text.last_logits
        return logits

    @torch.no_grad()
    def likeliest(self) -> list[tuple[int, float]]:
        """The likeliest next token of every sequence, and its log-probability."""
        if self._has_places and all(text.last_logits is None for text in self.texts):
            return self._places().likeliest(self._lanes)
        ids, log_p = likeliest(self.logits())
        return list(zip(ids.tolist(), log_p.tolist(), strict=True))

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Reads one more token of each sequence, int64 [B], on any device; those of texts that have left are not
        looked at.
        """
        going = [text for text in self.texts if text.last_logits is None]
        if not self._has_places:
            self._read_elsewhere(going, tokens)
        elif going:
            places = self._places()
            due = [text for text in going if places.due(text.lanes.start)]
            try:
                refused = [places.step(text.lanes.start, tokens[text.lanes], self.inner).sum() for text in due]
                places.read(tokens)  # whatever is computed in the lanes of others, nobody sees
            except BaseException:
                for text in due:
                    places.take_back(text.lanes.start)
                raise
            for text, count in zip(due, refused, strict=True):
                text.steps, text.rolled_back = text.steps + 1, text.rolled_back + count
        for text in going:
            text.position += 1

    def _read_elsewhere(self, texts: Sequence[Text], tokens: Tensor) -> None:
        """One more token of each of these texts, read by `read`, with the inner steps that it asks for."""
        alike: dict[object, list[Text]] = {}
        for text in texts:
            alike.setdefault(shapes_of(_of(text)), []).append(text)
        for group in alike.values():
            own = torch.cat([tokens[text.lanes] for text in group]).unsqueeze(1).to(self.model.device)
            before = together([_of(text) for text in group])
            found = read(self.model, before, own, inner=self.inner, learn=self.learn, guard=True)
            states = [found.state] if len(group) == 1 else apart(found.state)
            refusals = found.rolled_back.split([text.size for text in group])
            for text, state, refused in zip(group, states, refusals, strict=True):
                text.state, text.steps = state, text.steps + refused.shape[1]
                text.rolled_back = text.rolled_back + refused.sum()

    def leave(self, index: int) -> None:
        """Goes on without a text, which stays as it is and keeps its rows of the logits."""
        text = self.texts[index]
        if text.last_logits is not None:
            return
        text.last_logits = self.logits()[text.lanes]
        if self._has_places:
            text.state = self.states()[index]
            self._places().leave(text.lanes.start)

    @torch.no_grad()
    def states(self) -> list[ReadingState]:
        """The state of each text, as `longread.inner_loop.read` goes on with it; values, copied out of the places."""
        if all(text.state is not None for text in self.texts):
            return [_of(text) for text in self.texts]
        with self._looking() as places:
            return [places.take(t.lanes.start, t.size) if t.state is None else t.state for t in self.texts]

    def state(self) -> ReadingState:
        """That of the first text."""
        return self.states()[0]

    @property
    def facts(self) -> StateFacts:
        """Those of the first text's state, which is not copied for it."""
        text = self.texts[0]
        if text.state is not None:
            return text.state.facts
        with self._looking() as places:
            return places.facts(text.lanes.start, text.size)

    def rest(self) -> None:
        """Lets others have its places, from which it moves out if they come before it is asked for more."""
        self._release(self)

    def end(self) -> list[ReadingState]:
        """Moves out of its places, which others may have, and gives the states."""
        if any(text.state is None for text in self.texts):
            self.move_out(self._places())
        self._release(None)
        return [_of(text) for text in self.texts]

    def _release(self, resting: Decoder | None) -> None:
        if self._pooled is not None:
            pooled, self._pooled = self._pooled, None
            pool_of(self.model).release(pooled, resting)

    @torch.no_grad()
    def move_out(self, places: Places) -> None:
        """Takes its texts out of `places`, as values."""
        for text in self.texts:
            if text.state is None:
                text.state = places.take(text.lanes.start, text.size)
                places.leave(text.lanes.start)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[Places]:
        """The places, with these texts in them, for who only looks: a decoder that rests goes on resting."""
        working = self._pooled is not None
        try:
            yield self._places()
        finally:
            if not working:
                self.rest()

    def _places(self) -> Places:
        """The places, with these texts in them."""
        if self._pooled is not None and not self._pooled.fits(self.model, self._lanes, learn=self.learn):
            self.move_out(self._pooled.places)
            self._pooled = None
        if self._pooled is None:
            self._pooled = pool_of(self.model).acquire(self.model, self, self._lanes, learn=self.learn)
        places = self._pooled.places
        for text in self.texts:
            if text.state is not None and text.last_logits is None:
                places.put(text.lanes.start, text.state, learn=self.learn)
                text.state = None
        return places


def _of(text: Text) -> ReadingState:
    if text.state is None:
        raise LookupError("the text is in the places")
    return text.state


def _without_waiting(state: ReadingState) -> ReadingState:
    """The state without its unfinished mini-batch: who reads frozen never learns from it."""
    return dataclasses.replace(
        state, hidden=state.hidden[:, :0], targets=state.targets[:, :0], targets_mask=state.targets_mask[:, :0]
    )


@dataclass(eq=False)
class PooledPlaces:
    """Places, and what they can be used for."""

    places: Places
    kind: tuple[object, ...]
    resting: Callable[[], Decoder | None] = lambda: None
    """Whoever is in there while nobody works there."""

    def fits(self, model: Transformer, lanes: int, *, learn: bool) -> bool:
        """Whether they have these lanes, and the model is where it was and of the same type."""
        return self.kind == _kind_of_places(model, lanes, learn)

    def evict(self) -> None:
        """Makes whoever rests there move out."""
        decoder, self.resting = self.resting(), lambda: None
        if decoder is not None:
            decoder.move_out(self.places)


class PlacesPool:
    """The places at rest of one model; may be used from several threads."""

    def __init__(self) -> None:
        self.resting: list[PooledPlaces] = []
        """Newest last."""
        self._lock = threading.Lock()

    def acquire(self, model: Transformer, decoder: Decoder, lanes: int, *, learn: bool) -> PooledPlaces:
        """Places for a decoder alone: those in which it rests, with its texts still in them; others; or new ones."""
        with self._lock:
            own = next((pooled for pooled in self.resting if pooled.resting() is decoder), None)
            if own is not None:
                self.resting.remove(own)
                if own.fits(model, lanes, learn=learn):
                    own.resting = lambda: None
                    return own
                own.evict()
            fitting = [pooled for pooled in self.resting if pooled.fits(model, lanes, learn=learn)]
            empty = [pooled for pooled in fitting if pooled.resting() is None]
            for found in empty or (fitting if len(self.resting) >= KEPT else []):
                self.resting.remove(found)
                found.evict()
                return found
        return PooledPlaces(Places(model, lanes, learn=learn), _kind_of_places(model, lanes, learn))

    def release(self, pooled: PooledPlaces, decoder: Decoder | None) -> None:
        """Takes places in which nobody works any more; `decoder` rests in them."""
        pooled.resting = (lambda: None) if decoder is None else weakref.ref(decoder)
        with self._lock:
            others = [one for one in self.resting if one.kind != pooled.kind or one.resting() is not None]
            kept = [*others, pooled][-KEPT:]
            for other in self.resting:
                if other not in kept:
                    other.evict()
            self.resting = kept


_POOLS: weakref.WeakKeyDictionary[Transformer, PlacesPool] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def pool_of(model: Transformer) -> PlacesPool:
    """The pool of a model; it goes with the model."""
    with _LOCK:
        return _POOLS.setdefault(model, PlacesPool())


def _kind_of_places(model: Transformer, lanes: int, learn: bool) -> tuple[object, ...]:
    return lanes, learn, model.embedding.weight.data_ptr(), model.dtype
