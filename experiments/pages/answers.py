"""What an adapted model knows of what it has read: answers, what it writes after reading, guesses for a verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from experiments.adapted.answers import STRETCHES
from experiments.figures import panel
from experiments.merging import merged, runs_table
from experiments.page import Data, Plot, Table, mean
from experiments.results import Results

from longread.evaluate import Line, mcnemar, ratio, short

SLUG = "answers"
HEADING = """# What does a reader know of what it has read?

What came out, and where was it worse than its twins?"""
NEEDS = ("questions-books",)
NAMES = {"first-order": "reader", "swa": "SWA twin", "full": "full-attention twin", "original": "pretrained"}
TEXTS = {"books": "books", "source": "Python source"}
WRITTEN = {
    "continuations": ("judge", "judge-full"),
    "continuations without the repetition penalty": ("judge-plain",),
}
NOTHING = "nothing read"
UNREAD = (f"reader, {NOTHING}", f"pretrained, {NOTHING}")
"""Of these it is shown; those of twins are alike."""
WRITERS = ("human text", "reader, learning", "reader, frozen", "SWA twin", "full-attention twin")
ROWS = {"questions": (*TEXTS,), **dict.fromkeys(WRITTEN, WRITERS), "drafts": ("original", "full")}
WINDOW = 1024
EDGES = (0, 1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens after the evidence."""
PAIRS = (
    ("reader, learning", "reader, frozen"),
    ("reader, learning", "SWA twin"),
    ("reader, learning", f"reader, {NOTHING}"),
    ("reader, learning", "full-attention twin"),
    ("reader, learning", "pretrained"),
)
LINES = {
    "reader, learning": "TTT-E2E",
    "reader, frozen": "TTT-E2E, frozen",
    "SWA twin": "SWA",
    "full-attention twin": "full attention",
    f"reader, {NOTHING}": "nothing read",
}


def gather(found: Results) -> dict[str, Any]:
    asked = {name: asked_of(found.evaluations.get(f"questions-{name}", {}), name) for name in TEXTS}
    drafts = {name: found.evaluations.get(name, {}).get("speculative") for name in ("drafts", "drafts-full")}
    return {
        "questions": {name: content for name, content in asked.items() if content},
        **{what: _written(found, jobs) for what, jobs in WRITTEN.items()},
        "drafts": {content["settings"]["verifier"]: content["rows"] for content in drafts.values() if content},
    }


def merge(before: Data, new: Data, run: Data) -> dict[str, Any]:
    return merged(before, new, run, ROWS)


def asked_of(files: Data, kind: str, names: Data = NAMES) -> dict[str, Any]:
    """Of each question where and what it was, and of each reader, in the same order, what it answered; no text."""
    order: dict[tuple[Any, ...], int] = {}
    asked: dict[str, list[Any]] = {"text": [], "context": [], "kind": [], "distance": []}
    readers: dict[str, dict[int, Any]] = {}
    for what in ("questions", "questions-full"):
        for result in files.get(what, {}).get("results", []):
            name = names[result["model"]]
            label = name if result["reading"] == "static" else f"{name}, {result['reading']}"
            for trial in result["trials"]:
                key = tuple(trial[part] for part in ("text", "context_length", "kind", "question"))
                if key not in order:
                    order[key] = len(order)
                    number = int(trial["text"].split()[-1]) - 1
                    asked["text"].append(number // STRETCHES if kind == "books" else number)
                    for part, value in (("context", "context_length"), ("kind", "kind"), ("distance", "distance")):
                        asked[part].append(trial[value])
                readers.setdefault(label, {})[order[key]] = trial
    kept = {}
    for label, trials in readers.items():
        before = readers.get(f"{label.partition(',')[0]}, {NOTHING}", {})
        rows = [trials.get(i) for i in range(len(order))]
        kept[label] = {
            "right": _flags(trial and trial["is_right"] for trial in rows),
            "written": _flags(trial and trial["is_greedy"] for trial in rows),
            "gained": _flags(_gained(trial, before.get(i)) for i, trial in enumerate(rows)),
            "nats": [trial and round(trial["nats"][0], 3) for trial in rows],
        }
    return {"asked": asked, "readers": kept} if kept else {}


def _flags(values: Iterator[bool | None] | Any) -> str:
    """1 for yes, 0 for no, - for a question that was not asked."""
    return "".join("-" if value is None else str(int(value)) for value in values)


def _gained(trial: Data | None, before: Data | None) -> bool | None:
    """Whether of all choices the right one has gained most by what was read; None where nothing was."""
    if trial is None or before is None or trial is before:
        return None
    first, *others = (a - b for a, b in zip(before["nats"], trial["nats"], strict=True))
    return all(first > other for other in others)


def _written(found: Results, jobs: Sequence[str]) -> dict[str, Any]:
    """Verdicts by who wrote, how."""
    verdicts = {}
    for job in jobs:
        content = found.evaluations.get(job, {}).get("written", {"verdicts": ()})
        for one in content["verdicts"]:
            name = NAMES.get(one["writer"], one["writer"])
            label = name if one["reading"] in ("static", "human") else f"{name}, {one['reading']}"
            facts = {key: content[key] for key in ("judge", "documents", "prompt_tokens")}
            verdicts[label] = facts | {key: value for key, value in one.items() if key != "seconds"}
    return verdicts


def tables(results: Data) -> Iterator[Table]:
    for name, content in results["questions"].items():
        yield from _about(TEXTS[name], Asked(content))
    for what in WRITTEN:
        if results.get(what):
            yield _continuations(what, results[what])
    if results["drafts"]:
        yield _drafts(results["drafts"])
    yield from runs_table(results)


class Asked:
    """Questions about one kind of text."""

    def __init__(self, content: Data) -> None:
        self.places, self.readers = content["asked"], content["readers"]
        self.shown = [label for label in self.readers if NOTHING not in label or label in UNREAD]
        self.contexts, self.kinds = (sorted(set(self.places[what])) for what in ("context", "kind"))

    def chosen(self, label: str, wanted: Callable[[int], bool]) -> list[int]:
        """Those of the wanted questions that a reader was asked."""
        return [i for i, flag in enumerate(self.readers[label]["right"]) if flag != "-" and wanted(i)]

    def share(self, label: str, what: str, wanted: Callable[[int], bool]) -> str:
        flags = [self.readers[label][what][i] for i in self.chosen(label, wanted)]
        known = [flag == "1" for flag in flags if flag != "-"]
        return f"{sum(known) / len(known):.2f}" if known else ""

    def nats(self, label: str, wanted: Callable[[int], bool]) -> str:
        found = [self.readers[label]["nats"][i] for i in self.chosen(label, wanted)]
        return f"{sum(found) / len(found):.2f}" if found else ""

    def at(self, what: str, value: Any) -> Callable[[int], bool]:
        return lambda i: bool(self.places[what][i] == value)

    @property
    def far(self) -> Callable[[int], bool]:
        """With evidence beyond the window."""
        return self.between(WINDOW, EDGES[-1] + 1)

    def between(self, low: int, high: int) -> Callable[[int], bool]:
        return lambda i: low <= self.places["distance"][i] < high


def _about(what: str, asked: Asked) -> Iterator[Table]:
    contexts = {short(T): asked.at("context", T) for T in asked.contexts}
    distances = {f"{short(a)}–{short(b)}": asked.between(a, b) for a, b in pairwise(EDGES)}
    count = len(asked.places["text"])
    distances = {name: place for name, place in distances.items() if any(map(place, range(count)))}
    kinds = {kind: asked.at("kind", kind) for kind in asked.kinds}
    far = asked.far

    def rows(*columns: tuple[str, Sequence[Callable[[int], bool]]]) -> list[list[str]]:
        made = []
        for label in asked.shown:
            cells = []
            for measure, places in columns:
                cells += [
                    asked.nats(label, place) if measure == "nats" else asked.share(label, measure, place)
                    for place in places
                ]
            made.append([label, *cells])
        return made

    head = ["", *(f"right, {T}" for T in contexts), *(f"gained most, {T}" for T in contexts)]
    yield Table(
        f"{count:,} questions about {what}, by tokens read; chance 0.17:",
        [*head, *(f"written, {T}" for T in contexts)],
        rows(*((measure, [*contexts.values()]) for measure in ("right", "gained", "written"))),
    )
    yield Table(
        f"Questions about {what}, by tokens after the evidence, right / written:",
        ["", *distances],
        [
            [label, *(f"{right} / {written}" if right else "" for right, written in zip(*pair, strict=True))]
            for label in asked.shown
            for pair in [[[asked.share(label, m, place) for place in distances.values()] for m in ("right", "written")]]
        ],
    )
    yield Table(
        f"Questions about {what}, nats of the right answer, by tokens after the evidence:",
        ["", *distances],
        rows(("nats", [*distances.values()])),
    )
    yield Table(
        f"Questions about {what} whose evidence is beyond the window, by kind:",
        ["", *(f"{kind}, {what_}" for what_ in ("right", "written") for kind in kinds)],
        rows(*((m, [lambda i, at=at: at(i) and far(i) for at in kinds.values()]) for m in ("right", "written"))),  # type: ignore[misc]
    )
    yield pairs_table(what, asked, PAIRS, far)


def pairs_table(what: str, asked: Asked, pairs: Sequence[tuple[str, str]], wanted: Callable[[int], bool]) -> Table:
    """Of two readers each, who alone is right, with McNemar's test."""
    head = ["", "questions", "right: first alone", "second alone", "p", "written: first alone", "second alone", "p"]
    rows = [row for pair in pairs if (row := _paired(asked, *pair, wanted))]
    return Table(f"Two readers, questions about {what}, evidence beyond the window:", [*head, "nats less"], rows)


def _paired(asked: Asked, first: str, second: str, wanted: Callable[[int], bool]) -> list[str] | None:
    if not {first, second} <= asked.readers.keys():
        return None
    both = [i for i in asked.chosen(first, wanted) if asked.readers[second]["right"][i] != "-"]
    row = [f"{first}, against {second}", str(len(both))]
    for measure in ("right", "written"):
        one, other = ([asked.readers[label][measure][i] == "1" for i in both] for label in (first, second))
        alone = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((one, other), (other, one))]
        row += [*map(str, alone), f"{mcnemar(one, other):.2g}"]
    saved = np.array([asked.readers[second]["nats"][i] - asked.readers[first]["nats"][i] for i in both])
    texts = np.array([asked.places["text"][i] for i in both])
    less = ratio(
        *(np.array([sums[texts == text].sum() for text in set(texts)]) for sums in (saved, np.ones(len(both))))
    )
    return [*row, "" if less is None else _half(asdict(less), 2, "+")]


def _continuations(what: str, verdicts: Data) -> Table:
    rows, head = [], []
    for label, one in verdicts.items():
        entries = [entry for entry in one["by_position"] if entry["start"] >= one["prompt_tokens"]]
        head = [f"{entry['start']:,}–{entry['end']:,}" for entry in entries]
        cells = [mean(entry["score"]["nats_per_token"]) for entry in entries]
        whole = one["continuation"]["nats_per_token"]
        above = one.get("above_human")
        said = f"{above['mean']:+.3f} ± {above['high'] - above['mean']:.3f}".replace("-", "−") if above else ""
        cells += [f"{whole['mean']:.3f} ± {whole['high'] - whole['mean']:.3f}", said, f"{one['repeated']['mean']:.1%}"]
        rows.append([label, *cells])
    columns = ["", *head, "all", "nats/byte above human", "repeated 8-grams"]
    return Table(f"What the pretrained model makes of {what}, nats per token:", columns, rows)


def _drafts(verifiers: Data) -> Table:
    rows = []
    for name, measured in verifiers.items():
        for row in measured:
            cells = [f"{row['position']:,}", str(row["documents"])]
            for key, digits in (("overlap", 3), ("accepted", 2)):
                cells += [_half(row[f"{key}_{reading}"], digits) for reading in ("learning", "frozen")]
            cells.insert(4, _half(row["overlap_gained"], 3, sign="+"))
            cells += [f"{row[f'tokens_per_second_{who}']:.0f}" for who in ("alone", "learning", "frozen")]
            rows.append([NAMES.get(name, name), *cells])
    head = [
        "verifier",
        "after",
        "texts",
        "overlap, learning",
        "frozen",
        "gained",
        "accepted a round, learning",
        "frozen",
    ]
    return Table(
        "The reader drafts four tokens a round:", [*head, "tokens/s alone", "with drafts, learning", "frozen"], rows
    )


def _half(estimate: Data, digits: int, sign: str = "") -> str:
    said = f"{estimate['mean']:{sign}.{digits}f}"
    if estimate["high"] is not None:  # of more than one text
        said += f" ± {estimate['high'] - estimate['mean']:.{digits}f}"
    return said.replace("-", "−")


def plots(results: Data) -> Iterator[Plot]:
    for name, content in results["questions"].items():
        asked = Asked(content)
        charts = []
        for measure, title in (("right", "right of six choices"), ("written", "written word for word")):
            lines = []
            for label, shown in LINES.items():
                places = [(high, asked.between(low, high)) for low, high in pairwise(EDGES)]
                points = [
                    (float(high), float(share))
                    for high, place in places
                    if label in asked.readers and (share := asked.share(label, measure, place))
                ]
                lines += [Line(shown, points)] if points else []
            charts.append(
                panel(f"{TEXTS[name]}: {title}", lines, "share", "tokens after the evidence, at most", ticks=EDGES[1:])
            )
        yield Plot(name, f"Shares of questions about {TEXTS[name]} that were answered right, by distance", charts)
