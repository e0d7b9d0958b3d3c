"""How owners share the device: whoever has had least of its time goes first."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Shares:
    """Seconds of the device that each owner has had. Time away is no credit: who comes back begins with the least that
    any owner has who has work under way.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}

    def had(self, owner: str) -> float:
        """The smaller, the sooner it is an owner's turn."""
        return self._had.get(owner, 0.0)

    def come(self, owner: str, others: Collection[str]) -> None:
        """An owner begins to have work; `others` have some already."""
        self._had = {other: self.had(other) for other in (*others, owner)}
        if owner not in others:
            self._had[owner] = max(self._had[owner], min(map(self.had, others), default=0.0))

    def charge(self, owners: Sequence[str], seconds: float) -> None:
        """The device has worked so long for all of these, a part each; who had several parts is named as often."""
        for owner in owners:
            self._had[owner] = self.had(owner) + seconds / len(owners)
