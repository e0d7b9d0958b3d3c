"""Needles in haystacks: does a model say again, word by word, what it has read once?

Scored as RULER does: the answer is decoded greedily and is right if it contains the value, letter case aside. The
paper reports this for S-NIAH-1 to 3: learning while reading does not bring back a detail from beyond the window. So
every accuracy is also split by whether the whole needle is among the last K tokens of the prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.evaluate.continuation import continue_texts
from longread.evaluate.estimate import Estimate, ratio, wilson
from longread.evaluate.figures import Chart, Figures, Grid, colors, estimate_line, share_cell
from longread.evaluate.haystack import VARIANTS, Probe, Sample
from longread.evaluate.summary import finite
from longread.inner_loop import ReadingState
from longread.model import Transformer
from longread.session import Sampling
from longread.tokenizer import Tokenizer

FORMAT = "longread-needle/1"
ANSWER_TOKENS = 128
"""RULER's."""
GUESS = {"number": math.log(9 * 10**6), "uuid": 122 * math.log(2)}
"""−log p of a value for a reader who knows its form and nothing else, nats."""


@dataclass(frozen=True, slots=True)
class NeedleTrial:
    """One prompt answered."""

    variant: str
    context_length: int
    depth: float
    needle_start: int
    inside_window: bool
    """Whether the whole needle is among the last K tokens of the prompt."""
    key: str
    value: str
    answer: str
    value_nats: float
    """−log p of the value right after the prompt, which tells degrees of not finding it."""
    found: bool
    diverged_at: int | None
    """Tokens read when the model's logits were no longer finite."""
    probe: Probe = "question"


@dataclass(frozen=True, slots=True)
class Search:
    """All prompts answered by one model read in one way."""

    model: str
    reading: str
    window: int
    trials: list[NeedleTrial]
    seconds: float

    @property
    def label(self) -> str:
        return self.model if self.reading == "static" else f"{self.model}, {self.reading}"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of needles found at one context length, with Wilson's interval."""

    variant: str
    context_length: int
    all: Estimate
    inside_window: Estimate | None
    outside_window: Estimate | None
    by_depth: list[tuple[float, Estimate]]
    value_nats: Estimate
    """−log p of the value, mean over prompts with Student's interval; `GUESS` without having read it."""
    value_nats_inside: Estimate | None
    value_nats_outside: Estimate | None


@dataclass(frozen=True, slots=True)
class Needles:
    """All searches over the same prompts."""

    searches: list[Search]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`, every answer included."""
        results = [
            {"model": s.model, "reading": s.reading, "window": s.window, "seconds": s.seconds}
            | {"accuracy": [asdict(a) for a in accuracies(s.trials)], "trials": [asdict(t) for t in s.trials]}
            for s in self.searches
        ]
        return finite(
            {"format": FORMAT, "confidence": 0.95, "interval": "Wilson", "results": results} | {"notes": self.notes}
        )


def search(
    name: str,
    model: Transformer,
    inner: InnerConfig,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    learn: bool,
    batch_size: int = 8,
    max_tokens: int = ANSWER_TOKENS,
    on_samples: Callable[[int], None] | None = None,
    begun: Callable[[Sequence[Sample]], ReadingState] | None = None,
) -> Search:
    """Reads each prompt and answers it, prompts of one length side by side.

    An answer ends at a BOS. All answers of a batch are complete when each holds its value.

    Args:
        samples: encoded with `tokenizer`, the model's own.
        on_samples: told how many more prompts have been answered.
        begun: reads the first tokens of a batch of prompts, at least one less than they have; None: nobody does.
    """
    learn = learn and model.config.num_suffix_blocks > 0
    reading = "static" if not model.config.num_suffix_blocks else "learning" if learn else "frozen"
    unknown = range(tokenizer.vocab_size, model.config.vocab_size)
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    trials: list[NeedleTrial] = []
    started = time.perf_counter()
    for batch in _batches(samples, batch_size):

        def enough(written: Tensor, batch: Sequence[Sample] = batch) -> bool:
            return all(_found(s, _text(ids, tokenizer)) for s, ids in zip(batch, written.tolist(), strict=True))

        prompts = torch.from_numpy(np.stack([sample.tokens for sample in batch]))
        values = [tokenizer.encode_inside(f" {sample.value}")[0] for sample in batch]
        probe = torch.zeros(len(batch), max(map(len, values)), dtype=torch.long)
        for row, ids in zip(probe, values, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        state = begun(batch) if begun else None
        answers = continue_texts(
            model,
            inner,
            prompts if state is None else prompts[:, state.position :],
            sampling,
            learn=learn,
            forbidden=unknown,
            probe=probe,
            enough=enough,
            state=state,
        )
        for i, sample in enumerate(batch):
            nats = math.nan if answers.probe_nll is None else answers.probe_nll[i, : len(values[i])].sum().item()
            text = _text(answers.tokens[i].tolist(), tokenizer)
            trials.append(_trial(sample, text, nats, model.config.window_size, answers.diverged_at[i]))
        if on_samples:
            on_samples(len(batch))
    return Search(name, reading, model.config.window_size, trials, time.perf_counter() - started)


def accuracies(trials: Iterable[NeedleTrial]) -> list[Accuracy]:
    """Shares of needles found, by variant and context length."""

    def place(trial: NeedleTrial) -> tuple[str, int]:
        return trial.variant, trial.context_length

    scores = []
    for (variant, length), group in groupby(sorted(trials, key=place), key=place):
        members = list(group)
        depths = sorted({trial.depth for trial in members})
        by_depth = [(depth, _share(t for t in members if t.depth == depth)) for depth in depths]
        scores.append(
            Accuracy(
                variant,
                length,
                _share(members) or Estimate(0.0, None, None, 0),
                _share(t for t in members if t.inside_window),
                _share(t for t in members if not t.inside_window),
                [(depth, share) for depth, share in by_depth if share],
                _nats(members) or Estimate(math.nan, None, None, 0),
                _nats(t for t in members if t.inside_window),
                _nats(t for t in members if not t.inside_window),
            )
        )
    return scores


def needle_figures(needles: Needles) -> Figures:
    """A table and a chart for each variant, and a table by depth."""
    scores = [(search, accuracies(search.trials)) for search in needles.searches]
    color = colors([search.model for search, _ in scores])
    grids, charts = [], []
    for variant in sorted({a.variant for _, found in scores for a in found}):
        columns = [{a.context_length: a for a in found if a.variant == variant} for _, found in scores]
        labels = [search.label for search, _ in scores]
        lengths = sorted({length for column in columns for length in column})
        rows: list[tuple[str, list[str]]] = []
        nats: list[tuple[str, list[str]]] = []
        depths: list[tuple[str, list[str]]] = []
        for T in lengths:
            at = [column[T] for column in columns]
            rows.append((f"{T:,}", [share_cell(a.all) for a in at]))
            nats.append((f"{T:,}", [str(a.value_nats) for a in at]))
            if any(a.inside_window for a in at) and any(a.outside_window for a in at):
                rows.append(("inside the window", [share_cell(a.inside_window) for a in at]))
                rows.append(("outside", [share_cell(a.outside_window) for a in at]))
                nats.append(("inside the window", [str(a.value_nats_inside or "–") for a in at]))
                nats.append(("outside", [str(a.value_nats_outside or "–") for a in at]))
            for i, (depth, _) in enumerate(at[0].by_depth):
                depths.append((f"{T:,} at {depth:.0%}", [share_cell(a.by_depth[i][1]) for a in at]))
        grids.append(Grid(f"{variant}: needles found, with 95 % intervals", "context", labels, rows))
        guess = GUESS["uuid" if variant == VARIANTS[3].name else "number"]
        title = f"{variant}: nats for the right value (a guess: {guess:.1f})"
        grids.append(Grid(title, "context", labels, nats))
        grids.append(Grid(f"{variant}, by depth of the needle", "context, depth", labels, depths))
        lines = [
            estimate_line(
                search.label, [(T, column[T].all) for T in lengths], color[search.model], search.reading == "frozen"
            )
            for (search, _), column in zip(scores, columns, strict=True)
        ]
        name = chart_name(variant)
        charts.append(Chart(name, f"{variant} by context length", "context length T, tokens", "needles found", lines))
    return Figures(grids, charts, [*needles.notes, *_remarks(needles.searches)])


def chart_name(variant: str) -> str:
    """Of the file that a variant's chart becomes."""
    return variant.lower().replace("-", "_")


def _remarks(searches: Sequence[Search]) -> list[str]:
    notes = [
        f"{search.label}: {len(lost)} of {len(search.trials)} readings were no longer finite, the first after "
        f"{min(lost):,} tokens; their answers count as wrong."
        for search in searches
        if (lost := [t.diverged_at for t in search.trials if t.diverged_at is not None])
    ]
    windows = dict.fromkeys(f"{search.window:,} ({search.model})" for search in searches)
    if any(trial.probe == "verbatim" for search in searches for trial in search.trials):
        notes.append("No question: each prompt ends with the needle's own words up to its value.")
    return [
        *notes,
        f"Inside the window: the whole needle is among the last K tokens of the prompt, K = {', '.join(windows)}.",
    ]


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterable[Sequence[Sample]]:
    """Samples of one length each, in order of length."""
    ordered = sorted(samples, key=lambda sample: sample.context_length)
    for _, group in groupby(ordered, key=lambda sample: sample.context_length):
        members = list(group)
        yield from (members[i : i + batch_size] for i in range(0, len(members), batch_size))


def _trial(sample: Sample, answer: str, value_nats: float, window: int, diverged: int | None) -> NeedleTrial:
    return NeedleTrial(
        variant=sample.variant.name,
        context_length=sample.context_length,
        depth=sample.depth,
        needle_start=sample.needle_start,
        inside_window=sample.context_length - sample.needle_start <= window,
        key=sample.key,
        value=sample.value,
        answer=answer,
        value_nats=value_nats,
        found=diverged is None and _found(sample, answer),
        diverged_at=diverged,
        probe=sample.probe,
    )


def _found(sample: Sample, answer: str) -> bool:
    return sample.value.lower() in answer.lower()


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    end = ids.index(tokenizer.bos_id) if tokenizer.bos_id in ids else len(ids)
    return tokenizer.decode(ids[:end])


def _share(trials: Iterable[NeedleTrial]) -> Estimate | None:
    found = [trial.found for trial in trials]
    return wilson(sum(found), len(found))


def _nats(trials: Iterable[NeedleTrial]) -> Estimate | None:
    nats = np.array([trial.value_nats for trial in trials])
    return ratio(nats, np.ones(len(nats)))
