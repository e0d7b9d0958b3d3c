"""The model in the box, read in stretches of 64K tokens, and its twins of equal size and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number, signed
from experiments.pages import KINDS, TITLES, unit_of
from experiments.plan import BOXED
from experiments.results import Curve, Results, short

from longread.evaluate import Chart, Line

SLUG = "boxed-model"
HEADING = """# The model in the box

What does it gain by learning while it reads, and how far?"""
NEEDS = (BOXED,)
READINGS = {
    "TTT-E2E (boxed), learning": (BOXED, "learning"),
    "TTT-E2E (boxed), frozen": (BOXED, "frozen"),
    "SWA twin": ("twin-swa-32", "static"),
    "full-attention twin": ("twin-full-32", "static"),
}
HEALTH = ("steps", "mean_gradient_norm", "largest_gradient_norm", "clipped_share", "drift")
TICKS = [64, 256, 1024, 4096, 16384, 65536]
STAGES = {"after 4000 steps at 1K": "", "extended to 8K": "-8", "extended to 32K": "-32"}
FINISHED = "extended to 32K"
LENGTHS = (1, 8, 32, 64)


def gather(found: Results) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in KINDS:
        bins = {name: found.bins(job, f"{kind}-64", reading) for name, (job, reading) in READINGS.items()}
        results |= {f"{name}, {kind}": row for name, row in bins.items() if row}
        read = found.reading(BOXED, f"{kind}-64", "learning")
        if read:
            gains = {row["context_length"]: row["gain_over_frozen"] for row in read["by_context_length"]}
            results[f"gain by context length, {kind}"] = gains
            results[f"health, {kind}"] = {key: read["health"][key] for key in HEALTH}
    for name, (job, reading) in READINGS.items():
        for stage, suffix in STAGES.items():
            at = job.removesuffix("-32") + suffix
            losses = {f"{kind} {L}K": found.loss(at, f"{kind}-{L}", reading) for kind in KINDS for L in LENGTHS}
            if any(losses.values()):
                results[f"{name}, {stage}"] = losses
    return results


def tables(results: Data) -> Iterator[Table]:
    """By position; the gain over frozen; and means by length of the finished models."""
    for kind in KINDS:
        bins = {name: results[key] for name in READINGS if (key := f"{name}, {kind}") in results}
        yield Table(
            f"{kind.capitalize()}, by position in stretches of 64K tokens, twice the longest of training:",
            ["", *bins["TTT-E2E (boxed), learning"]],
            [[name, *map(number, row.values())] for name, row in bins.items()],
        )
    gains = {kind: results[f"gain by context length, {kind}"] for kind in KINDS}
    yield Table(
        "Gain over frozen, mean over the first T tokens, 95 % interval over stretches:",
        ["", *(short(int(length)) for length in gains["books"])],
        [[kind, *map(signed, row.values())] for kind, row in gains.items()],
    )
    rows = {name: results[key] for name in READINGS if (key := f"{name}, {FINISHED}") in results}
    yield Table(
        "Mean over stretches of each length (64K is beyond all training):",
        ["", *(f"{kind} {L}K" for kind in KINDS for L in LENGTHS)],
        [[name, *map(number, losses.values())] for name, losses in rows.items()],
    )


def from_first(bins: Mapping[str, float]) -> dict[str, float]:
    """The bins below 1K put together."""
    sizes = {"0–128": 128, "128–256": 128, "256–512": 256, "512–1K": 512}
    first = sum(size * bins[name] for name, size in sizes.items()) / sum(sizes.values())
    return {"0–1K": first} | {name: loss for name, loss in bins.items() if name not in sizes}


def plots(found: Results) -> Iterator[Plot]:
    chart = panel(
        "What learning while reading adds",
        [Line(TITLES[kind], against(found, kind, (BOXED, "frozen"), (BOXED, "learning"))) for kind in KINDS],
        "nats per token gained over frozen", "token index", zero="frozen", ticks=TICKS,
    )  # fmt: skip
    yield Plot("gain", "Gain of learning over frozen reading by token index", [chart])
    if "twin-swa-32" in found.evaluations:
        yield Plot("twins", "Loss minus that of the SWA twin by token index", [twins(found, k) for k in KINDS])


def twins(found: Results, kind: str) -> Chart:
    names = {"TTT-E2E": "TTT-E2E (boxed), learning", "TTT-E2E, frozen": "TTT-E2E (boxed), frozen"}
    names["full attention"] = "full-attention twin"
    curves = {name: against(found, kind, READINGS[row], READINGS["SWA twin"]) for name, row in names.items()}
    lines = [Line(name, [(x, y) for x, y in curve if x >= 128]) for name, curve in curves.items()]
    title = f"{TITLES[kind]}: loss minus the SWA twin's"
    return panel(title, lines, unit_of(kind), "token index", zero="SWA", ticks=TICKS[1:])


def against(found: Results, kind: str, this: tuple[str, str], other: tuple[str, str]) -> Curve:
    """Loss by token index in stretches of 64K tokens, of one reading minus another."""
    reference = dict(found.curve(other[0], f"{kind}-64", other[1]))
    curve = found.curve(this[0], f"{kind}-64", this[1])
    return [(x, y - reference[x]) for x, y in curve if x >= 64 and x in reference]
