"""Needles of an adapted model and of three attempts at finding more of them; storage, addressing and read-out apart."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from experiments.figures import panel
from experiments.merging import merged, runs_table
from experiments.page import Data, Plot, Table, number
from experiments.results import Results

from longread.config import ModelConfig
from longread.evaluate import Line, mcnemar, ratio
from longread.evaluate.needle import GUESS

SLUG = "recall"
HEADING = """# Does an adapted model recall what lies beyond its window?

What came out, what was worse than before, and which of storage, addressing and read-out fails?"""
NEEDS = ("first-order", "needle-first-order")
BASE = "reader"
MODELS = {
    "original": "pretrained, full attention",
    "full": "full-attention twin",
    "swa": "SWA twin",
    "swa-recall-30": "SWA twin, facts 30 %",
    "first-order": BASE,
    "surprise-0.5": "reader, surprise 0.5",
    "surprise-1": "reader, surprise 1",
    "recall-10": "reader, facts 10 %",
    "recall-30": "reader, facts 30 %",
    "recall-30-s1": "reader, facts 30 %, seed 1",
    "recall-30-surprise-1": "reader, facts 30 %, surprise 1",
    "recall-30-suffix-15": "reader, 15 blocks, facts 30 %",
    "hybrid": "hybrid reader",
    "hybrid-recall-30": "hybrid reader, facts 30 %",
    "hybrid-frozen": "hybrid twin",
}
"""Names of jobs. The hybrids have full attention in every sixth block, and no constant memory."""
SHORTER = {"dial-base": "reader, 50 steps"}
"""The base of what was trained in 50 steps, not asked for needles."""
ROWS = {"asked": (*MODELS.values(),), "books": (*(MODELS | SHORTER).values(),)}
PLOTTED = {
    "full attention": ("full-attention twin", "static"),
    "SWA": ("SWA twin", "static"),
    "first-order": (BASE, "learning"),
    "first-order, frozen": (BASE, "frozen"),
    "facts 30 %": ("reader, facts 30 %", "learning"),
    "surprise 1": ("reader, surprise 1", "learning"),
    "hybrid 5 : 1": ("hybrid reader", "learning"),
}
TICKS = tuple(1024 << i for i in range(1, 6))
VARIANTS = ("S-NIAH-1", "S-NIAH-2", "S-NIAH-3")
READINGS = ("static", "learning", "frozen")
OCTAVES = ("512–1K", "1–2K", "2–4K", "4–8K", "8–16K", "16–32K")
SESSION = "one session"
GROWTH = "bytes a token"
HALF_PRECISION = 2


def gather(found: Results) -> dict[str, Any]:
    asked = {}
    for job, name in MODELS.items():
        results = found.evaluations.get(f"needle-{job}") or found.evaluations.get(job, {})
        answers: dict[str, Any] = {}
        for probe in ("question", "verbatim"):
            for result in results.get(probe, {}).get("results", []):
                answers.setdefault(result["reading"], {})[probe] = _trials(result["trials"])
        asked |= {name: answers} if answers else {}
    books = {name: _books(found, job) for job, name in (MODELS | SHORTER).items()}
    return {"asked": asked, "books": {name: row for name, row in books.items() if row}}


def merge(before: Data, new: Data, run: Data) -> dict[str, Any]:
    return merged(before, new, run, ROWS)


def _trials(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By variant and context, in the order of the prompts: 1 where the needle was inside the window, where it was found
    and where the model's logits were no numbers; nats of the value."""
    answers: dict[str, Any] = {}
    for trial in trials:
        of = answers.setdefault(trial["variant"], {}).setdefault(str(trial["context_length"]), {})
        for key in ("inside_window", "found"):
            of[key] = of.get(key, "") + str(int(trial[key]))
        of["diverged"] = of.get("diverged", "") + str(int(trial["diverged_at"] is not None))
        of.setdefault("nats", []).append(trial["value_nats"])
    return answers


def _books(found: Results, job: str) -> dict[str, Any]:
    """Losses by octave and reading, speed of training, size of a session; empty if it was not evaluated."""
    what = next((w for w in ("validation-128", "validation-32") if found.bins(job, w)), None)
    if what is None:
        return {}
    row: dict[str, Any] = {}
    for reading in READINGS:
        losses = found.bins(job, what, reading)
        row |= {reading: {at: losses[at] for at in OCTAVES if at in losses}} if losses else {}
    speeds = [step["tokens_per_second"] for step in found.metrics.get(job, []) if "tokens_per_second" in step]
    row |= (
        {"training, tokens/s": statistics.median(speeds), "tokens": found.metrics[job][-1]["tokens"]} if speeds else {}
    )
    for each in found.evaluations.get(job, {}).get("size", {}).get("rows", []):
        if each["what"].startswith(SESSION):
            row[SESSION] = each["bytes"]
    if job in found.configs:
        row[GROWTH] = bytes_a_token(ModelConfig.from_dict(found.configs[job]["model"]))
    return row


def bytes_a_token(config: ModelConfig) -> int:
    """By which a session grows with each token, in bfloat16: keys and values of blocks without a window."""
    full = sum(config.window_of(block) is None for block in range(config.num_blocks))
    return full * 2 * config.kv_width * HALF_PRECISION


class _Answers:
    """What one model said, read in one way."""

    def __init__(self, answers: Data, variant: str, probe: str = "question") -> None:
        self.by_context = answers.get(probe, {}).get(variant, {})

    def part(self, inside: bool, contexts: Sequence[str] | None = None) -> tuple[list[bool], list[float]]:
        """Found and nats of prompts whose needle is inside the window, or of those beyond it, in these contexts."""
        found, nats = [], []
        for context, of in self.by_context.items():
            if contexts is None or context in contexts:
                for within, right, cost in zip(of["inside_window"], of["found"], of["nats"], strict=True):
                    if (within == "1") == inside:
                        found.append(right == "1")
                        nats.append(cost)
        return found, nats


def tables(results: Data) -> Iterator[Table]:
    yield from (table for table in _tables(results) if table.rows)


def _tables(results: Data) -> Iterator[Table]:
    asked = results["asked"]
    readers = {
        f"{name}, {reading}" if reading != "static" else name: answers[reading]
        for name, answers in asked.items()
        for reading in READINGS
        if reading in answers
    }
    for variant in VARIANTS:
        seen = {context for answers in readers.values() for context in _Answers(answers, variant).by_context}
        contexts = sorted(seen, key=int)
        far = [c for c in contexts if any(_Answers(a, variant).part(False, [c])[0] for a in readers.values())]
        head = ["", "inside", *(f"beyond, {int(context):,}" for context in far)]
        for what, cell in (("needles found", _share), ("nats of the value", _mean)):
            rows = []
            for name, answers in readers.items():
                said = _Answers(answers, variant)
                parts = [said.part(True), *(said.part(False, [context]) for context in far)]
                rows.append([name, *(cell(*part) for part in parts)])
            yield Table(f"{variant}, {what}, by where the needle lies and by context:", head, rows)
    yield Table(_ORACLES, _ORACLE_HEAD, list(_oracles(readers)))
    yield Table(_INFORMED, _INFORMED_HEAD, list(_informed(readers)))
    yield Table(_PAIRS, _PAIR_HEAD, list(_pairs(asked)))
    yield Table(_BOOKS, _BOOK_HEAD, list(_book_rows(results["books"])))
    yield from runs_table(results)


def _share(found: Sequence[bool], _: Sequence[float]) -> str:
    return f"{sum(found)} of {len(found)}" if found else ""


def _mean(_: Sequence[bool], nats: Sequence[float]) -> str:
    return f"{statistics.mean(nats):.1f}" if nats else ""


_ORACLES = "Nats of the value: read-out, addressing and storage apart, needles beyond the window at 4K:"
_ORACLE_HEAD = ["", *(f"{variant}, {what}" for variant in VARIANTS for what in ("inside", "asked", "verbatim"))]


def _oracles(readers: Data) -> Iterator[list[str]]:
    for name, answers in readers.items():
        if "verbatim" in answers:
            cells = []
            for variant in VARIANTS:
                asked, verbatim = (_Answers(answers, variant, probe) for probe in ("question", "verbatim"))
                context = sorted(verbatim.by_context, key=int)[:1]
                cells += [_mean(*asked.part(True)), _mean(*asked.part(False, context))]
                cells.append(_mean(*verbatim.part(False, context)))
            yield [name, *cells]


_INFORMED = "Nats below the least that a reader can average who has not read the value, beyond the window from 4K on:"
_INFORMED_HEAD = ["", *VARIANTS]
FROM = 4096


def _informed(readers: Data) -> Iterator[list[str]]:
    """Above zero something of the value itself has got through: what is said of a drawn value without a trace of it
    costs `GUESS` at least in the mean."""
    for name, answers in readers.items():
        cells = []
        for variant in VARIANTS:
            said = _Answers(answers, variant)
            _, nats = said.part(False, [context for context in said.by_context if int(context) >= FROM])
            guess = GUESS["uuid" if variant == VARIANTS[2] else "number"]
            cells.append(_signed(ratio(guess - np.array(nats), np.ones(len(nats)))))
        if any(cells):
            yield [name, *cells]


_PAIRS = "Two readers of the same prompts, in contexts that both have read:"
_PAIR_HEAD = ["", "needles", "prompts", "found by the first alone", "by the second alone", "p, McNemar", "nats less"]


def _pairs(asked: Data) -> Iterator[list[str]]:
    """Learning against frozen, and each attempt against the base, learning; inside the window the first alone."""
    base = asked.get(BASE, {})
    for name, answers in asked.items():
        against = {}
        if {"learning", "frozen"} <= answers.keys():
            against[f"{name}: learning, frozen"] = (answers["learning"], answers["frozen"])
        if "learning" in answers and name != BASE and "learning" in base:
            against[f"{name}, {BASE}: both learning"] = (answers["learning"], base["learning"])
        for label, (first, second) in against.items():
            for place, variant in itertools.product(("beyond", "inside"), VARIANTS):
                row = _paired(_Answers(first, variant), _Answers(second, variant), place == "inside")
                if row and (place == "beyond" or second is answers.get("frozen")):
                    yield [label, f"{variant}, {place}", *row]


def _paired(first: _Answers, second: _Answers, inside: bool) -> list[str] | None:
    contexts = [context for context in first.by_context if context in second.by_context]
    (one, cost), (other, before) = (said.part(inside, contexts) for said in (first, second))
    if not one or len(one) != len(other):
        return None
    alone = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((one, other), (other, one))]
    less = ratio(np.array(before) - np.array(cost), np.ones(len(cost)))
    return [str(len(one)), *map(str, alone), f"{mcnemar(one, other):.2g}", _signed(less)]


def _signed(less: Any) -> str:
    return "" if less is None else f"{less.mean:+.1f} ± {less.half_width:.1f}".replace("-", "−")


_BOOKS = "Ordinary loss, nats per token on seven validation books, and what it costs:"
_BOOK_HEAD = ["", "tokens", *OCTAVES, "training, tokens/s", "session, MiB", "more a token, bytes"]


def _book_rows(books: Data) -> Iterator[list[str]]:
    for name, row in books.items():
        for reading in READINGS:
            if reading in row:
                losses = [number(row[reading].get(at)) for at in OCTAVES]
                speed, size = row.get("training, tokens/s"), row.get(SESSION)
                cells = [f"{row['tokens'] / 1e6:.2f}M" if "tokens" in row else "", *losses]
                cells += [f"{speed:,.0f}" if speed else "", f"{size / 2**20:.0f}" if size else ""]
                label = name if reading == "static" else f"{name}, {reading}"
                yield [label, *cells, f"{row[GROWTH]:,}" if row.get(GROWTH) else "0" if GROWTH in row else ""]


def plots(results: Data) -> Iterator[Plot]:
    asked = as_lines(results["asked"])
    charts = [panel(variant, lines, "nats of the value", ticks=TICKS) for variant, lines in asked.items() if lines]
    if charts:
        caption = "What the right value costs after the question, by context, needles beyond the window"
        yield Plot("nats", caption, charts)


def as_lines(asked: Data) -> dict[str, list[Line]]:
    """Mean nats by context, of needles beyond the window."""
    lines: dict[str, list[Line]] = {variant: [] for variant in VARIANTS}
    for variant, (label, (name, reading)) in itertools.product(VARIANTS, PLOTTED.items()):
        said = _Answers(asked.get(name, {}).get(reading, {}), variant)
        costs = {int(context): said.part(False, [context])[1] for context in said.by_context}
        points = [(float(context), statistics.mean(nats)) for context, nats in sorted(costs.items()) if nats]
        lines[variant] += [Line(label, points)] if points else []
    return lines
