"""Figures of an estimate, for people and for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Unit = Literal["bytes", "count", "schedule", "remark", "seconds", "percent", "days", "USD"]


class EstimateRow(NamedTuple):
    """One figure: of what, in which unit."""

    what: str
    value: float | str | None
    unit: Unit

    @property
    def line(self) -> str:
        """The row for people."""
        if self.unit == "remark":
            return str(self.value)
        return f"{self.what:60} {_SHOWN[self.unit](self.value):>12}"


def shown(size: int) -> str:
    """A number of bytes."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


_SHOWN: dict[Unit, Callable[[Any], str]] = {
    "bytes": shown,
    "count": "{:,}".format,
    "schedule": lambda value: value or "none of them",
    "seconds": lambda value: f"{value:,.3f} s" if value >= 1 else f"{1e3 * value:.3f} ms",
    "percent": "{:.1f} %".format,
    "days": lambda value: f"{value:,.1f} days" if value >= 2 else f"{24 * value:.1f} hours",
    "USD": "{:,.0f} USD".format,
}
