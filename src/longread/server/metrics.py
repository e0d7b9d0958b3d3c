"""Counters, times and the engine's numbers, in the format of Prometheus."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


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
        """Shows what `stats` says at the moment of asking, each number as longread_engine_<name>."""
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
            if isinstance(value, int | float):
                clean = re.sub(r"\W", "_", name)
                yield GaugeMetricFamily(f"longread_engine_{clean}", "As the engine counts it.", value=float(value))
