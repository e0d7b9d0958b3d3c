"""Counters, times and the engine's numbers, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

_COUNTERS = {
    "tokens_read": "Tokens that sessions have read, those they wrote left out.",
    "tokens_written": "Tokens that sessions have written.",
    "steps": "Inner steps, those rolled back included.",
    "rolled_back": "Inner steps not taken because they would have done damage.",
    "groups": "Groups of sessions that read a piece together.",
    "rounds": "Rounds of one token for every session that writes.",
}
_GAUGES = {
    "sessions": "Sessions, frozen twins included.",
    "sessions_device": "Sessions where the model computes.",
    "sessions_host": "Sessions in the host's memory.",
    "sessions_disk": "Sessions on the disk only.",
    "bytes_device": "Bytes of sessions where the model computes, places for writing included.",
    "bytes_host": "Bytes of sessions in the host's memory.",
    "bytes_disk": "Bytes of session files.",
    "tasks": "Tasks under way or waiting.",
    "writing": "Sessions that are writing.",
    "restoring": "Sessions that are being read again after a crash.",
    "lost": "Sessions that could not be restored, or not all of them.",
    "uptime_seconds": "Since the engine started.",
}
"""The engine's numbers and what they mean; those that only grow are counters."""
disable_created_metrics()  # a second series beside every counter, which nobody asks for


class Meters:
    """What the server counts. Each instance has its own registry, so that several servers fit into one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "longread_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "longread_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("method", "route"),
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.under_way = Gauge("longread_requests_under_way", "Requests being answered.", registry=self._registry)
        self.tokens = Counter("longread_tokens", "Tokens of finished requests.", ("work",), registry=self._registry)
        self.refused = Counter(
            "longread_refused", "Requests refused before any work.", ("reason",), registry=self._registry
        )

    def follow(self, stats: Callable[[], Mapping[str, float]]) -> None:
        """Shows what `stats` says at the moment of asking: longread_engine_<name>, and of counters <name>_total."""
        self._registry.register(_Numbers(stats))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Numbers(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # asked only when there is something to show: the engine need not have started

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats().items():
            if name in _COUNTERS:
                yield CounterMetricFamily(f"longread_engine_{name}", _COUNTERS[name], value=value)
            else:
                yield GaugeMetricFamily(f"longread_engine_{name}", _GAUGES[name], value=value)
