"""Who decodes in which places: a decoder owns its own while it works; at rest they are there for whoever comes next.

Places that a working decoder has are nobody else's, and go with it. Places at rest belong to the lender of their model.
It keeps few: making them costs time, on a GPU that of capturing graphs, and keeping them the memory of a session. A
decoder may rest in them with its texts, and goes on without copying anything. Only when as many rest as are kept does
who comes next make the oldest move out, which copies windows and changes no result: what rests in places has its
windows nowhere else, so places of one's own take hardly more memory than moving another out.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from longread.inner_loop.places import Places
from longread.model import Transformer

KEPT = 2
"""Most sets of places that rest beside a model."""


class Tenant(Protocol):
    """Who rests in places."""

    def move_out(self, places: Places) -> None:
        """Takes its texts out, as values."""


@dataclass(eq=False)
class Lent:
    """Places, and what they can be used for."""

    places: Places
    kind: tuple[object, ...]
    resting: Callable[[], Tenant | None] = lambda: None
    """Whoever is in there while nobody works there."""

    def fits(self, model: Transformer, lanes: int, *, learn: bool) -> bool:
        """Whether they have these lanes, and the model is where it was and of the same type."""
        return self.kind == _kind(model, lanes, learn)

    def vacate(self) -> None:
        """Makes whoever rests there move out."""
        tenant, self.resting = self.resting(), lambda: None
        if tenant is not None:
            tenant.move_out(self.places)


class Lender:
    """The places at rest of one model; may be used from several threads."""

    def __init__(self) -> None:
        self.resting: list[Lent] = []
        """Newest last."""
        self._lock = threading.Lock()

    def lend(self, model: Transformer, tenant: Tenant, lanes: int, *, learn: bool) -> Lent:
        """Places for a decoder alone: those in which it rests, with its texts still in them; others; or new ones."""
        with self._lock:
            own = next((lent for lent in self.resting if lent.resting() is tenant), None)
            if own is not None:
                self.resting.remove(own)
                if own.fits(model, lanes, learn=learn):
                    own.resting = lambda: None
                    return own
                own.vacate()
            fitting = [lent for lent in self.resting if lent.fits(model, lanes, learn=learn)]
            empty = [lent for lent in fitting if lent.resting() is None]
            for found in empty or (fitting if len(self.resting) >= KEPT else []):
                self.resting.remove(found)
                found.vacate()
                return found
        return Lent(Places(model, lanes, learn=learn), _kind(model, lanes, learn))

    def give_back(self, lent: Lent, tenant: Tenant | None) -> None:
        """Takes places in which nobody works any more; `tenant` rests in them."""
        lent.resting = (lambda: None) if tenant is None else weakref.ref(tenant)
        with self._lock:
            others = [one for one in self.resting if one.kind != lent.kind or one.resting() is not None]
            kept = [*others, lent][-KEPT:]
            for other in self.resting:
                if other not in kept:
                    other.vacate()
            self.resting = kept


_LENDERS: weakref.WeakKeyDictionary[Transformer, Lender] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def lender_of(model: Transformer) -> Lender:
    """The lender of a model; it goes with the model."""
    with _LOCK:
        return _LENDERS.setdefault(model, Lender())


def _kind(model: Transformer, lanes: int, learn: bool) -> tuple[object, ...]:
    return lanes, learn, model.embedding.weight.data_ptr(), model.dtype
