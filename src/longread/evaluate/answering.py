"""Question answering after reading: what a text has told, asked with its evidence far behind or just before.

A text is read once, up to each context length in turn. Whatever is asked there goes on from the same state, which
stays as it is: neither question nor answer is learned from, nor is a mini-batch that the question interrupts. An answer
counts twice. Of the choices the likeliest is taken, by −log p of all its tokens; and it is looked at whether greedy
decoding would write the right one, each of whose tokens must then be the likeliest in its place.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from longread.config import InnerConfig
from longread.evaluate.estimate import Estimate, ratio, wilson
from longread.evaluate.figures import Chart, Figures, Grid, colors, estimate_line, share_cell
from longread.evaluate.positions import octaves
from longread.evaluate.questions import Question
from longread.evaluate.summary import finite
from longread.inner_loop import ReadingState, begin, read
from longread.inner_loop.state import together
from longread.model import Transformer

FORMAT = "longread-questions/1"
NOTHING_READ = "nothing read"
CHART = "right_answers"


class AskedText(NamedTuple):
    """A text, int64 [n], and what is asked about beginnings of it, none longer than n."""

    name: str
    tokens: np.ndarray
    questions: Sequence[Question]


@dataclass(frozen=True, slots=True)
class AnswerTrial:
    """One question answered."""

    text: str
    context_length: int
    kind: str
    distance: int
    """Tokens of the text after the evidence."""
    question: str
    choices: list[str]
    """The right answer first."""
    nats: list[float]
    """−log p of each choice right after the question, in the same order."""
    is_greedy: bool
    """Whether greedy decoding writes the right answer."""

    @property
    def is_right(self) -> bool:
        """Whether the right answer is the likeliest choice."""
        return all(self.nats[0] < other for other in self.nats[1:])


@dataclass(frozen=True, slots=True)
class AnswerSheet:
    """All questions answered by one model read in one way."""

    model: str
    reading: str
    trials: list[AnswerTrial]
    seconds: float

    @property
    def label(self) -> str:
        return self.model if self.reading == "static" else f"{self.model}, {self.reading}"


@dataclass(frozen=True, slots=True)
class QuestionAnswering:
    """The same questions answered by all readers."""

    answers: list[AnswerSheet]
    num_choices: int
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`: shares by context length and by kind, and every question with its answers."""
        facts = {"format": FORMAT, "confidence": 0.95, "interval": "Wilson", "num_choices": self.num_choices}
        results = [
            {"model": one.model, "reading": one.reading, "seconds": one.seconds}
            | {"by_context": _scores(one.trials, lambda trial: trial.context_length)}
            | {"by_kind": _scores(one.trials, lambda trial: trial.kind)}
            | {"trials": [dataclasses.asdict(t) | {"is_right": t.is_right} for t in one.trials]}
            for one in self.answers
        ]
        return finite(facts | {"results": results, "notes": self.notes})


@torch.no_grad()
def answer_questions(
    name: str,
    model: Transformer,
    inner: InnerConfig,
    texts: Sequence[AskedText],
    *,
    learn: bool,
    beginning: Sequence[int] | None = None,
    batch_size: int = 8,
    on_questions: Callable[[int], None] | None = None,
) -> AnswerSheet:
    """Reads each text up to each context length that is asked about, and answers the questions there.

    Args:
        texts: encoded with the model's own tokenizer, as the questions are.
        beginning: where given, this is read instead of each text: what a question is answered without it.
        batch_size: questions with one of their choices each, read side by side.
        on_questions: told how many more questions have been answered.
    """
    learn = learn and model.config.num_suffix_blocks > 0
    reading = "static" if not model.config.num_suffix_blocks else "learning" if learn else "frozen"
    trials: list[AnswerTrial] = []
    started = time.perf_counter()
    for text in texts:
        state, tokens = begin(model), torch.from_numpy(text.tokens).to(model.device)
        if beginning is not None:
            tokens = torch.tensor([*beginning], dtype=torch.long, device=model.device)
        for length, members in groupby(sorted(text.questions, key=_length), key=_length):
            piece = tokens[state.position : length]
            state = read(model, state, piece.unsqueeze(0), inner=inner, learn=learn).state
            questions = list(members)
            trials += _answered(model, inner, state, text.name, questions, batch_size)
            if on_questions:
                on_questions(len(questions))
    return AnswerSheet(name, NOTHING_READ if beginning is not None else reading, trials, time.perf_counter() - started)


def _length(question: Question) -> int:
    return question.context_length


def _answered(
    model: Transformer, inner: InnerConfig, state: ReadingState, text: str, questions: Sequence[Question], size: int
) -> Iterator[AnswerTrial]:
    """The questions, all of which follow `state`, answered."""
    pairs = [(q.ids, choice.ids) for q in questions for choice in q.choices]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        found |= zip(rows, _scored(model, inner, state, [pairs[i] for i in rows]), strict=True)
    done = 0
    for q in questions:
        scores = [found[done + i] for i in range(len(q.choices))]
        done += len(q.choices)
        choices, nats = [choice.text for choice in q.choices], [nats for nats, _ in scores]
        yield AnswerTrial(text, q.context_length, q.kind, q.distance, q.text, choices, nats, scores[0][1])


def _scored(
    model: Transformer, inner: InnerConfig, state: ReadingState, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """−log p of each answer right after its question and `state`, and whether all its tokens are the likeliest."""
    rows = torch.zeros(len(pairs), max(len(q) + len(a) for q, a in pairs), dtype=torch.long)
    is_answer = torch.zeros_like(rows, dtype=torch.bool)
    for row, here, (question, answer) in zip(rows, is_answer, pairs, strict=True):
        row[: len(question) + len(answer)] = torch.tensor([*question, *answer])
        here[len(question) : len(question) + len(answer)] = True
    states = dataclasses.replace(together([state] * len(pairs)), positions=None)
    tokens = rows.to(model.device)
    found = read(model, states, tokens, inner=inner, learn=False, top=1)
    likeliest = tokens if found.top is None else found.top[1][..., 0]
    nats = found.nll.cpu().double().masked_fill(~is_answer, 0.0).sum(1)
    greedy = ((likeliest == tokens).cpu() | ~is_answer).all(1)
    return list(zip(nats.tolist(), greedy.tolist(), strict=True))


def answer_figures(answering: QuestionAnswering) -> Figures:
    """Tables by context, by kind and by distance of the evidence, and the last as a chart."""
    readers = answering.answers
    everything = [trial for one in readers for trial in one.trials]
    bins = octaves(max((trial.distance for trial in everything), default=0) + 1)
    by_context = [([T], f"{T:,}") for T in sorted({trial.context_length for trial in everything})]
    by_kind = [([kind], kind) for kind in sorted({trial.kind for trial in everything})]
    by_distance = [(range(low, high), f"{low:,}–{high:,}") for low, high in bins]

    def grid(title: str, what: str, places: Sequence[tuple[Container[Any], str]], cell: _Summary) -> Grid:
        rows = [
            (name, [cell([t for t in one.trials if getattr(t, what) in place]) for one in readers])
            for place, name in places
        ]
        return Grid(title, what.replace("_", " "), [one.label for one in readers], rows)

    choice = f"Right of {answering.num_choices} choices"
    grids = [
        grid(f"{choice}, with 95 % intervals", "context_length", by_context, _right),
        grid("Written word for word, decoding greedily", "context_length", by_context, _written),
        grid("Nats for the right answer", "context_length", by_context, _nats),
        grid(f"{choice}, by kind of question", "kind", by_kind, _right),
        grid(f"{choice}, by tokens after the evidence", "distance", by_distance, _right),
    ]
    color = colors([one.model for one in readers])
    lines = []
    for one in readers:
        shares = [(high, _share(t.is_right for t in one.trials if low <= t.distance < high)) for low, high in bins]
        points = [(float(high), share) for high, share in shares if share]
        lines.append(estimate_line(one.label, points, color[one.model], one.reading in ("frozen", NOTHING_READ)))
    chart = Chart(CHART, choice, "tokens after the evidence, at most", "right answers", lines)
    return Figures(grids, [chart], answering.notes)


_Summary = Callable[[Sequence[AnswerTrial]], str]


def _right(trials: Sequence[AnswerTrial]) -> str:
    return share_cell(_share(trial.is_right for trial in trials))


def _written(trials: Sequence[AnswerTrial]) -> str:
    return share_cell(_share(trial.is_greedy for trial in trials))


def _nats(trials: Sequence[AnswerTrial]) -> str:
    return str(_answer_nats(trials) or "–")


def _answer_nats(trials: Sequence[AnswerTrial]) -> Estimate | None:
    """−log p of the right answer; the text is the unit of sampling."""
    texts = {trial.text: [t.nats[0] for t in trials if t.text == trial.text] for trial in trials}
    sums = [sum(nats) if all(map(math.isfinite, nats)) else math.inf for nats in texts.values()]
    return ratio(np.array(sums), np.array([len(nats) for nats in texts.values()]))


def _scores(trials: Sequence[AnswerTrial], place: Callable[[AnswerTrial], Any]) -> list[dict[str, Any]]:
    scores = []
    for value in sorted({place(trial) for trial in trials}):
        here = [trial for trial in trials if place(trial) == value]
        right, written = _share(t.is_right for t in here), _share(t.is_greedy for t in here)
        facts = {"right": right, "written": written, "answer_nats": _answer_nats(here)}
        scores.append({"at": value} | {name: fact and dataclasses.asdict(fact) for name, fact in facts.items()})
    return scores


def _share(right: Iterable[bool]) -> Estimate | None:
    found = list(right)
    return wilson(sum(found), len(found))
