"""What `experiments.run` left, by job: losses, curves and training metrics out of its archives."""

from __future__ import annotations

import json
import math
import statistics
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]


@dataclass
class Results:
    """Archives loaded later win; losses of what they replace are kept in `runs`."""

    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    runs: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    """(job, evaluation) -> number of the archive -> loss: the same job may have run more than once."""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each training, as `RunConfig.as_dict` gives it."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """What run.json of each training says."""
    archives: int = 0

    @property
    def repeats(self) -> dict[tuple[str, str], list[float]]:
        return {key: list(losses.values()) for key, losses in self.runs.items() if len(losses) > 1}

    def load(self, archive: Path) -> None:
        self.archives += 1
        with tarfile.open(archive) as tar:
            for member in tar:
                path, file = Path(member.name), tar.extractfile(member)
                if file is None or path.suffix != ".json":
                    continue
                content = json.load(file)
                if path.parts[0] == "results":
                    self.evaluated(path.parts[1], path.stem, content)
                elif path.parts[0] == "metrics":
                    # A run that was cut off does not replace one that got further.
                    if len(content) and content[-1]["step"] >= self.steps(path.stem):
                        self.metrics[path.stem] = content
                elif path.parts[0] == "runs":
                    self.configs[path.stem] = content["config"]
                    self.records.append(content)
                elif path.name == "state.json":
                    self.state = content | {"jobs": self.state.get("jobs", {}) | content["jobs"]}
                elif path.name == "corpus.json":
                    self.corpus = content

    def evaluated(self, job: str, what: str, content: dict[str, Any]) -> None:
        if self.evaluations.get(job, {}).get(what) == content:
            return  # the same archive, or a later one of the same work
        self.evaluations.setdefault(job, {})[what] = content
        loss = self.loss(job, what)
        if loss is not None:
            self.runs.setdefault((job, what), {})[self.archives] = loss

    @property
    def run(self) -> dict[str, Any]:
        """With which code, when first, on what: what calls and records of training say of that."""
        first = min(self.records, key=lambda record: str(record.get("started")), default={})
        commits = [call.get("commit") for call in self.state.get("calls", [])]
        known = {
            "commit": next(filter(None, [*commits, first.get("commit")]), None),
            "started": first.get("started"),
            "gpus": first.get("hardware", {}).get("gpus"),
            "torch": first.get("versions", {}).get("torch"),
        }
        return {key: value for key, value in known.items() if value}

    def steps(self, job: str) -> int:
        """That its training took, up to where it was stopped."""
        rows = self.metrics.get(job, [])
        return int(rows[-1]["step"]) if rows else 0

    def status(self, job: str) -> str:
        """`done`, `failed`, `interrupted`, or nothing of a job that never started."""
        return str(self.state.get("jobs", {}).get(job, {}).get("status", ""))

    def reading(self, job: str, what: str, reading: str | None = None) -> dict[str, Any] | None:
        """One result of an evaluation: `reading` learning, frozen, static; None: static or learning."""
        found = self.evaluations.get(job, {}).get(what, {}).get("results", [])
        wanted = ("static", "learning") if reading is None else (reading,)
        return next((result for result in found if result["reading"] in wanted and "loss" in result), None)

    def loss(self, job: str, what: str, reading: str | None = None) -> float | None:
        found = self.reading(job, what, reading)
        return None if found is None else float(found["loss"]["nats_per_token"]["mean"])

    def loss_before(self, job: str, extension: str, what: str) -> float | None:
        """Of the run that an extension started from: the last one up to the archive in which the extension is."""
        last = max(self.runs.get((extension, what), {}), default=0)
        return next((y for n, y in reversed(self.runs.get((job, what), {}).items()) if n <= last), None)

    def curve(self, job: str, what: str, reading: str | None = None) -> Curve:
        """(position, loss), in bins of a quarter octave; the first bins, of few tokens, are left to `bins`."""
        found = self.reading(job, what, reading)
        rows = [] if found is None else found["curve"]
        return [
            (math.sqrt(r["start"] * r["end"]), r["score"]["nats_per_token"]["mean"]) for r in rows if r["start"] > 0
        ]

    def bins(self, job: str, what: str, reading: str | None = None) -> dict[str, float]:
        """Loss by octave of positions."""
        found = self.reading(job, what, reading)
        rows = [] if found is None else found["by_position"]
        return {between(r["start"], r["end"]): r["score"]["nats_per_token"]["mean"] for r in rows}

    def training(self, job: str) -> Curve:
        """(tokens, training loss), thinned and averaged between."""
        return [(row["tokens"], row["loss"]) for row in self.metrics.get(job, [])]


def lag(curve: Curve, reference: Curve, window: float = 3.3e6) -> Curve:
    """(million tokens, how far a training loss lies above that of another run; running means), to where it stopped."""

    def running(points: Curve, end: float) -> float:
        return statistics.mean(y for x, y in points if end - window < x <= end)

    ends = [x for x, _ in reference if curve and window <= x <= curve[-1][0]]
    return [(x / 1e6, running(curve, x) - running(reference, x)) for x in ends]


def between(start: int, end: int) -> str:
    """`128–256`, `1–2K`, `512–1K`."""
    if start >= 1024 and start % 1024 == end % 1024 == 0:
        return f"{start // 1024}–{end // 1024}K"
    return f"{start}–{short(end)}"


def short(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"
