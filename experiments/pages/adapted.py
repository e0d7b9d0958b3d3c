"""A pretrained model adapted first-order, its twins, one dial changed at a time, and a million tokens in one go."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from experiments.adapted import low_rank
from experiments.figures import panel
from experiments.merging import EARLIER, RUN_OF, merged, runs_table
from experiments.page import Data, Plot, Table, number
from experiments.results import Results

from longread.config import RunConfig
from longread.evaluate import Line
from longread.flops import step_flops

SLUG = "adapted"
HEADING = """# Which recipe makes the best reader of a pretrained model in an hour?

What came out, what was worse than before, and what would you give a user with one card?"""
NEEDS = ("first-order", "swa")
OCTAVES = {"0–1K": (0, 1), "1–2K": (1, 2), "2–4K": (2, 4), "4–8K": (4, 8), "8–16K": (8, 16), "16–32K": (16, 32)}
LONG_OCTAVES = OCTAVES | {"32–64K": (32, 64), "64–128K": (64, 128)}
MODELS = {
    "full": "full-attention twin",
    "swa": "SWA twin",
    "swa-s1": "SWA twin, seed 1",
    "swa-s2": "SWA twin, seed 2",
    "first-order": "first-order",
    "first-order-s1": "first-order, seed 1",
    "first-order-s2": "first-order, seed 2",
    "exact": "exact",
    "suffix-15": "first-order, 15 blocks",
}
DIALS = {
    "base": "base",
    "suffix-4": "4 blocks learn",
    "suffix-15": "15 blocks learn",
    "suffix-30": "30 blocks learn",
    "mini-batch-128": "mini-batch 128",
    "mini-batch-512": "mini-batch 512",
    "mini-batch-1024": "mini-batch 1024",
    "window-512": "window 512",
    "window-2048": "window 2048",
    "window-4096": "window 4096",
    "inner-lr-0.5": "inner rate 0.5",
    "inner-lr-2": "inner rate 2",
    "clip-0.25": "clip 0.25",
    "clip-none": "no clip",
    "fast-hidden-384": "fast MLPs of 384",
    "fast-hidden-768": "fast MLPs of 768",
    "low-rank-16": "steps of rank 16",
    "low-rank-64": "steps of rank 64",
}
ROWS = {"models": (*MODELS.values(),), "dials": (*DIALS.values(),), "long text": (*MODELS.values(),)}
SEEDS = {"": "seed 0", ", seed 1": "seed 1", ", seed 2": "seed 2"}
SESSION = "one session, at any length"
FAST = "of that fast weights, in float32"
"""MiB, by `longread estimate`."""
FACTORS = "of that, if only the factors of low-rank steps were kept"
PLOTTED = {
    "full": "full attention",
    "swa": "SWA",
    "first-order": "first-order",
    "exact": "exact",
    "suffix-15": "15 blocks",
}
AT = "16–32K"
STRETCHES = 16
READINGS = ("learning", "static", "frozen")


def gather(found: Results) -> dict[str, Any]:
    low_rank.register()
    models = {name: _model(found, name) for name in MODELS}
    trained = {name: _model(found, f"dial-{name}") for name in DIALS}
    texts = {MODELS[name]: _long_text(found, f"long-{name}") for name in MODELS}
    return {
        "models": {MODELS[name]: model for name, model in models.items() if model},
        "dials": {DIALS[name]: model for name, model in trained.items() if model},
        "long text": {name: text for name, text in texts.items() if text},
    }


def merge(before: Data, new: Data, run: Data) -> dict[str, Any]:
    return merged(before, new, run, ROWS)


def _model(found: Results, job: str) -> dict[str, Any]:
    """Losses by octave and reading, gains at 32K, size, operations and speed; empty if it was not evaluated."""
    evaluations = [what for what in ("validation-128", "validation-32") if _evaluated(found, job, what)]
    if not evaluations:
        return {}
    what, model = evaluations[0], {}
    for reading in READINGS:
        result = found.reading(job, what, reading)
        if result:
            rows = result["by_position"]
            losses = {name: _mean(rows, *(1024 * edge for edge in of)) for name, of in LONG_OCTAVES.items()}
            model[reading] = {name: loss for name, loss in losses.items() if loss is not None}
            model[f"{reading}, tokens/s"] = _speed(result)
    learning = found.reading(job, what, "learning") or {}
    lengths = {row["context_length"]: row["gain_over_frozen"] for row in learning.get("by_context_length", [])}
    model |= {"gain to 32K": lengths[32768]} if 32768 in lengths else {}
    health = learning.get("health") or {}
    model |= {key: health[key] for key in ("mean_gradient_norm", "clipped_share") if key in health}
    sizes = found.evaluations.get(job, {}).get("size", {}).get("rows", [])
    model |= {row["what"]: row["bytes"] / 2**20 for row in sizes if row["what"] in (SESSION, FAST)}
    metrics = found.metrics.get(job, [])
    if metrics:
        speeds = [row["tokens_per_second"] for row in metrics if "tokens_per_second" in row]
        model |= {"tokens": metrics[-1].get("tokens")}
        model |= {"training, tokens/s": [statistics.median(speeds), min(speeds), max(speeds)]} if speeds else {}
        peaks = [row["peak_memory_bytes"] for row in metrics if row.get("peak_memory_bytes")]
        model |= {"training, GiB": max(peaks) / 2**30} if peaks else {}
        shares = [row["inner_clipped"] for row in metrics if row.get("inner_clipped") is not None]
        model |= {"training, clipped inner steps of a step": [max(shares), shares[-1]]} if shares else {}
    if job in found.configs:
        config = RunConfig.from_dict(found.configs[job])
        _, ranked, rank = config.inner.optimizer.partition("low-rank-")
        if ranked:
            model[FACTORS] = 4 * low_rank.session_numbers(config.model, int(rank)) / 2**20
        flops = step_flops(config, "none")
        if flops:
            model["GFLOP a token"] = flops.model / (config.batch_size * config.context_length) / 1e9
    return model


def _evaluated(found: Results, job: str, what: str) -> bool:
    return any(found.reading(job, what, reading) for reading in READINGS)


def _long_text(found: Results, job: str) -> dict[str, Any]:
    """Losses by sixteenth of one text, and how the steps of the inner loop went."""
    text: dict[str, Any] = {}
    for reading in ("learning", "frozen"):
        result = found.reading(job, "joined", reading)
        if result:
            rows = result["curve"]
            part = max(row["end"] for row in rows) / STRETCHES
            ends = [round(part * i) for i in range(STRETCHES + 1)]
            text[reading] = [_mean(rows, start, end) for start, end in pairwise(ends)]
            text["tokens of a part"] = round(part)
            text[f"{reading}, tokens/s"] = _speed(result)
            text["diverged"] = text.get("diverged", 0) + len(result.get("diverged", []))
            health = result.get("health") or {}
            steps = ("start", "steps", "mean_gradient_norm", "largest_gradient_norm", "clipped_share")
            if "by_position" in health:
                text["steps"] = [{key: row[key] for key in steps} for row in health["by_position"]]
                text["drift"] = health["drift"]
    return text


def _mean(rows: list[dict[str, Any]], start: int, end: int) -> float | None:
    """Over positions start … end, if bins fill them."""
    inside = [row for row in rows if row["start"] >= start and row["end"] <= end]
    total = sum(row["end"] - row["start"] for row in inside)
    if total < 0.99 * (end - start):
        return None
    return sum((row["end"] - row["start"]) * row["score"]["nats_per_token"]["mean"] for row in inside) / total


def _speed(result: Mapping[str, Any]) -> float | None:
    return result["tokens"] / result["seconds"] if result.get("seconds") else None


def tables(results: Data) -> Iterator[Table]:
    models, dials = results["models"], results["dials"]
    octaves = [
        name for name in LONG_OCTAVES if any(name in m.get("frozen", m.get("static", {})) for m in models.values())
    ]
    rows = [
        [name if reading == "static" else f"{name}, {reading}", *(number(model[reading].get(at)) for at in octaves)]
        for name, model in models.items()
        for reading in READINGS
        if reading in model
    ]
    yield Table("Nats per token, seven validation books, after 6.55M tokens of training:", ["", *octaves], rows)
    learners = {name: model for name, model in models.items() if "learning" in model and "frozen" in model}
    if learners:
        rows = [[name, *(_gain(model, at) for at in octaves)] for name, model in learners.items()]
        yield Table("What reading adds, frozen less learning:", ["", *octaves], rows)
    rows = list(_seeds(models))
    if len(rows) > 2:
        yield Table(_SEEDS, ["", *OCTAVES], rows)
    trained = models | {f"dial: {name}": model for name, model in dials.items()}
    rows = [_speeds(name, model) for name, model in trained.items() if "training, tokens/s" in model]
    if rows:
        yield Table(_SPEED, _SPEED_HEAD, rows)
    if dials:
        yield Table(_DIALS, _DIAL_HEAD, [_dial(name, model, results) for name, model in dials.items()])
    for name, text in results["long text"].items():
        if {"learning", "frozen"} <= text.keys():
            yield Table(f"{name}, one text of {_long(text)} tokens:", _LONG_HEAD, list(_parts(text)))
        if "steps" in text:
            yield Table(f"{name}, inner steps along that text:", _STEPS_HEAD, list(_steps(text)))
    rows = list(_again(results))
    if rows:
        yield Table(_AGAIN, _AGAIN_HEAD, rows)
    yield from runs_table(results)


_SPEED = "Speed beside other jobs on the same GPU, tokens a second:"
_SPEED_HEAD = ["", "training, fastest step", "median", "GiB at most", "reading, learning", "reading, frozen"]
_DIALS = "One dial changed, 3.28M tokens of training each, learning:"
_DIAL_HEAD = ["", *OCTAVES, f"below base, {AT}", "at equal operations", "gain", "session, MiB", "operations"]
"""A session of low-rank steps would take what is in parentheses; operations of a token of training, × the base's."""
_SEEDS = "Seeds apart, nats per token by which first-order, learning, is below:"
_AGAIN = f"The same job in two runs, nats per token at {AT}:"
_AGAIN_HEAD = ["", "run", "loss", "run", "loss", "difference"]
_LONG_HEAD = ["after tokens", "learning", "frozen", "gain"]
_STEPS_HEAD = ["after tokens", "steps", "mean norm", "largest norm", "clipped", "drift at the end"]


def _speeds(name: str, model: Data) -> list[str]:
    median, _, fastest = model["training, tokens/s"]
    peak, learning = model.get("training, GiB"), model.get("learning, tokens/s")
    frozen = model.get("frozen, tokens/s") or model.get("static, tokens/s")
    cells = [f"{fastest:,.0f}", f"{median:,.0f}", f"{peak:.0f}" if peak else ""]
    return [name, *cells, *(f"{speed:,.0f}" if speed else "–" for speed in (learning, frozen))]


def _dial(name: str, model: Data, results: Data) -> list[str]:
    base, losses = results["dials"].get("base", {}), model.get("learning", {})
    flops, of_base = model.get("GFLOP a token"), base.get("GFLOP a token")
    cost = flops / of_base if flops and of_base else None
    loss, before = losses.get(AT), base.get("learning", {}).get(AT)
    longer = results["models"].get("first-order", {}).get("learning", {}).get(AT)
    ahead = equal = ""
    if name != "base" and loss is not None and before is not None:
        ahead = _signed(before - loss)
        if cost and longer is not None:
            # The base after half and after all of its tokens, and between, or a little beyond, by the logarithm.
            equal = _signed(before + (longer - before) * math.log2(cost) - loss)
    cells = [number(losses.get(at)) for at in OCTAVES]
    size = f"{model[SESSION]:.0f}" if SESSION in model else ""
    if FACTORS in model and FAST in model:
        size += f" ({model[SESSION] - model[FAST] + model[FACTORS]:.0f})"
    return [name, *cells, ahead, equal, _gain(model, AT), size, f"{cost:.2f}" if cost else ""]


def _gain(model: Data, at: str) -> str:
    learning, frozen = (model.get(reading, {}).get(at) for reading in ("learning", "frozen"))
    return "" if learning is None or frozen is None else _signed(frozen - learning)


def _seeds(models: Data) -> Iterator[list[str]]:
    """Its frozen self and the SWA twin of the same seed, at every octave that all of them have; then the means."""
    below: dict[str, list[list[float | None]]] = {"frozen": [], "SWA": []}
    for suffix, seed in SEEDS.items():
        model, twin = models.get(f"first-order{suffix}", {}), models.get(f"SWA twin{suffix}", {})
        for what, losses in (("frozen", model.get("frozen", {})), ("SWA", twin.get("static", {}))):
            learning = model.get("learning", {})
            row = [losses[at] - learning[at] if at in losses and at in learning else None for at in OCTAVES]
            if any(value is not None for value in row):
                below[what].append(row)
                yield [f"{seed}, {what}", *("" if value is None else _signed(value) for value in row)]
    for what, rows in below.items():
        if len(rows) > 1:
            columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
            yield [f"mean, {what}", *(_signed(statistics.mean(column)) if column else "" for column in columns)]


def _again(results: Data) -> Iterator[list[str]]:
    for table, rows in results.get(EARLIER, {}).items():
        for name, entries in rows.items():
            for number_, row in entries:
                now = results[table][name]
                for reading in READINGS:
                    a, b = (each.get(reading, {}).get(AT) for each in (row, now))
                    if a is not None and b is not None:
                        label = name if reading == "static" else f"{name}, {reading}"
                        shown = ["" if n is None else str(n + 1) for n in (number_, results[RUN_OF][table].get(name))]
                        prefix = "dial, " if table == "dials" else ""
                        yield [prefix + label, shown[0], number(a), shown[1], number(b), _signed(b - a)]


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _long(text: Data) -> str:
    return f"{text['tokens of a part'] * STRETCHES:,}"


def _parts(text: Data) -> Iterator[list[str]]:
    for i, (learning, frozen) in enumerate(zip(text["learning"], text["frozen"], strict=True)):
        gain = "" if learning is None or frozen is None else _signed(frozen - learning)
        yield [f"{i * text['tokens of a part']:,}", number(learning), number(frozen), gain]


def _steps(text: Data) -> Iterator[list[str]]:
    for row in text["steps"]:
        drift = [value for position, value in text["drift"] if position <= 2 * row["start"]]
        cells = [f"{row['start']:,}", f"{row['steps']:,}", f"{row['mean_gradient_norm']:.2f}"]
        cells += [f"{row['largest_gradient_norm']:.2f}", f"{row['clipped_share']:.1%}"]
        yield [*cells, f"{drift[-1]:.3f}" if drift else ""]


def plots(results: Data) -> Iterator[Plot]:
    centres = {name: 1024 * (start + end) / 2 for name, (start, end) in LONG_OCTAVES.items()}
    lines = [
        Line(label, [(centres[at], y) for at, y in model[reading].items()])
        for name, label in PLOTTED.items()
        if (model := results["models"].get(MODELS[name])) and (reading := next(r for r in READINGS if r in model))
    ]
    ticks = [1024 << i for i in range(8)]
    charts = [panel("Loss by position", lines, "nats per token", ticks=ticks, limits=(None, 3.5))]
    for name, text in results["long text"].items():
        part = text["tokens of a part"]
        parts = {
            reading: [((i + 0.5) * part / 1e6, y) for i, y in enumerate(text[reading]) if y is not None]
            for reading in ("learning", "frozen")
            if reading in text
        }
        found_lines = [Line(reading, points) for reading, points in parts.items() if points]
        if found_lines:
            charts.append(panel(f"One text, {name}", found_lines, x="million tokens", log=False))
    yield Plot("loss", "Loss by position of the models, and along one long text, learning and frozen", charts)
