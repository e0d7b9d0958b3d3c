"""Counters, times and the engine's numbers, in the format of Prometheus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from longread.engine import Engine
from longread.engine.interface import BOUNDS

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
_TIMES = {
    "waiting": ("waiting_seconds", "From a task's acceptance to the first that is computed for it."),
    "first_token": ("time_to_first_token_seconds", "From a task's acceptance to the first token that it writes."),
    "next_token": ("time_per_token_seconds", "From a written token of a task to the next."),
}
"""The engine's times: what they are called here, and what they mean."""
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

    def follow(self, engine: Engine) -> None:
        """Shows what the engine says at the moment of asking: longread_engine_<name>, and of counters <name>_total."""
        self._registry.register(_Numbers(engine))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Numbers(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # asked only when there is something to show: the engine need not have started

    def collect(self) -> Iterator[Metric]:
        for name, value in self._engine.stats().items():
            if name in _COUNTERS:
                yield CounterMetricFamily(f"longread_engine_{name}", _COUNTERS[name], value=value)
            else:
                yield GaugeMetricFamily(f"longread_engine_{name}", _GAUGES[name], value=value)
        for kind, times in self._engine.timings().items():
            name, meaning = _TIMES[kind]
            buckets = list(zip([*map(str, BOUNDS), "+Inf"], itertools.accumulate(times.counts), strict=True))
            yield HistogramMetricFamily(f"longread_engine_{name}", meaning, buckets=buckets, sum_value=times.seconds)
