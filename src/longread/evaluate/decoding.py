"""Decoding quality: how well another model predicts what a model writes after having read the beginning of a document.

The measure of the paper's decoding figure: read the first half of a text, write as much again, and let a judge score
both, by position. Less may be written, so that more is read of what a judge can read at once. The human continuation
of the same documents is the reference, and the same model decoding frozen the control. A low loss alone is no praise:
text that repeats itself is easy to predict, so the share of repeated 8-grams stands beside it.

A judge with the writer's tokenizer scores the very tokens that were written. Any other judge scores the text, encoded
anew; each of its tokens counts where its first byte lies. Losses are given per judge token, which compares writers
under one judge, and per byte, which also compares judges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from longread.config import InnerConfig, UserError
from longread.evaluate.continuation import continue_texts
from longread.evaluate.estimate import Estimate, ratio
from longread.evaluate.figures import Chart, Figures, Grid, colors, estimate_line
from longread.evaluate.judges import Judge
from longread.evaluate.measure import Document
from longread.evaluate.summary import Score, finite
from longread.model import Transformer
from longread.session.sampling import Sampling, derived_seed
from longread.tokenizer import Tokenizer

FORMAT = "longread-decoding/1"
HUMAN = "human text"
REPEATED_LENGTH = 8


@dataclass(frozen=True, slots=True)
class WrittenTexts:
    """Texts of T tokens each, [N, T]: the beginning as humans wrote it, the rest by `writer`."""

    writer: str
    reading: str
    tokens: np.ndarray
    seconds: float = 0.0
    diverged_at: list[int | None] = field(default_factory=list)
    written: int | None = None
    """Tokens of the rest; None: half."""

    @property
    def prompt_tokens(self) -> int:
        T = self.tokens.shape[1]
        return T // 2 if self.written is None else T - self.written

    @property
    def label(self) -> str:
        return self.writer if self.reading in ("static", "human") else f"{self.writer}, {self.reading}"


@dataclass(frozen=True, slots=True)
class BinScore:
    """The judge's loss on tokens start … end - 1 of prompt and continuation, in the writer's tokens."""

    start: int
    end: int
    score: Score


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """The judgement of one writing."""

    writer: str
    reading: str
    prompt: Score
    continuation: Score
    above_human: Estimate | None
    """Nats per byte above the human continuations of the same documents, paired by document; below 0: easier."""
    repeated: Estimate | None
    """Share of 8-grams of a continuation's tokens that occurred in it before."""
    by_position: list[BinScore]
    seconds: float

    @property
    def label(self) -> str:
        return self.writer if self.reading in ("static", "human") else f"{self.writer}, {self.reading}"


@dataclass(frozen=True, slots=True)
class DecodingQuality:
    """All verdicts of one judge on the same documents."""

    judge: str
    same_tokenizer: bool
    documents: int
    prompt_tokens: int
    sampling: Sampling
    seed: int
    verdicts: list[JudgeVerdict]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        table = {"format": FORMAT, "confidence": 0.95, "unit_of_sampling": "document"} | asdict(self)
        shown = ("temperature", "top_p", "repetition_penalty")
        return finite(table | {"sampling": {name: getattr(self.sampling, name) for name in shown}})


def prompts(documents: Sequence[Document], context_length: int) -> np.ndarray:
    """The first `context_length` tokens of each document, [N, T]; prompt and human continuation.

    Raises:
        UserError: a document is shorter.
    """
    for document in documents:
        if len(document.tokens) < context_length:
            raise UserError(f"{document.name} has {len(document.tokens)} tokens; --context asks for {context_length}")
    return np.stack([document.tokens[:context_length] for document in documents])


def write(
    name: str,
    model: Transformer,
    inner: InnerConfig,
    tokenizer: Tokenizer,
    human: np.ndarray,
    *,
    learn: bool,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 8,
    written: int | None = None,
    on_documents: Callable[[int], None] | None = None,
) -> WrittenTexts:
    """Reads all but the last `written` tokens of each document [N, T] (None: half of it), and goes on to T tokens.

    A BOS is never written: no document ends.
    """
    prompt = human.shape[1] // 2 if written is None else human.shape[1] - written
    forbidden = list(range(tokenizer.vocab_size, model.config.vocab_size))
    forbidden += tokenizer.beginning
    rows, diverged = [], []
    started = time.perf_counter()
    for first in range(0, len(human), batch_size):
        batch = torch.from_numpy(human[first : first + batch_size, :prompt])
        found = continue_texts(
            model,
            inner,
            batch,
            replace(sampling, max_tokens=human.shape[1] - prompt),
            learn=learn,
            seeds=[derived_seed(seed, first + i) for i in range(len(batch))],
            forbidden=forbidden,
        )
        rows.append(torch.cat((batch, found.tokens), 1).numpy())
        diverged += found.diverged_at
        if on_documents:
            on_documents(len(batch))
    static = not model.config.num_suffix_blocks
    reading = "static" if static else "learning" if learn else "frozen"
    return WrittenTexts(name, reading, np.concatenate(rows), time.perf_counter() - started, diverged, written)


def check_judge(judge: Judge, tokenizer: Tokenizer, human: np.ndarray, writers: Sequence[tuple[str, str]]) -> None:
    """Refuses a judgement that would mean nothing, before anything is written.

    Args:
        tokenizer: that of all writers.
        human: [N, T] tokens of the documents.
        writers: name and fingerprint of each.

    Raises:
        UserError: the judge is one of the writers, cannot read that much at once, or its tokenizer cannot spell the
            documents.
    """
    for name, fingerprint in writers:
        if fingerprint == judge.fingerprint:
            raise UserError(f"the judge {judge.name} is the writer {name}; a model likes what it writes, give another")
    for row in human:
        ids, text = _judge_ids(judge, tokenizer, row)
        if judge.context_limit is not None and len(ids) > judge.context_limit:
            raise UserError(
                f"the judge {judge.name} reads at most {judge.context_limit} tokens and the documents take {len(ids)}; "
                "lower --context or give another judge"
            )
        if judge.tokenizer.decode(ids).split() != text.split():
            raise UserError(
                f"the tokenizer of the judge {judge.name} does not give back the documents; its losses would be about "
                "another text, give a judge with a byte-level tokenizer"
            )


def verdicts(
    judge: Judge, tokenizer: Tokenizer, writings: Sequence[WrittenTexts], *, bins: int = 8, batch_size: int = 8
) -> list[JudgeVerdict]:
    """Scores every writing; the human one, if there is one, is what the others are compared with.

    Args:
        tokenizer: that of all writers.
        bins: of equal width over prompt and continuation; the border between these is one of theirs.
    """
    for writing in writings:
        check_bins(bins, writing.prompt_tokens, writing.tokens.shape[1])
    tables = [_sums(judge, tokenizer, writing, bins, batch_size) for writing in writings]
    human = next((table for table, writing in zip(tables, writings, strict=True) if writing.reading == "human"), None)
    return [_verdict(w, table, human, bins) for w, table in zip(writings, tables, strict=True)]


def check_bins(bins: int, prompt_tokens: int, context_length: int) -> None:
    """Raises `UserError` if no border of equal bins lies between prompt and continuation."""
    if bins < 2 or _prompt_bins(bins, prompt_tokens, context_length) is None:
        fits = context_length // math.gcd(prompt_tokens, context_length)
        raise UserError(
            f"--bins {bins} has no border behind the {prompt_tokens} of {context_length} tokens that are read; "
            f"give {fits}, or read another share of them"
        )


def _prompt_bins(bins: int, prompt_tokens: int, context_length: int) -> int | None:
    """How many bins the prompt has; None where it ends inside one."""
    return next((i for i in range(1, bins) if context_length * i // bins == prompt_tokens), None)


def decoding_figures(quality: DecodingQuality) -> Figures:
    """An overview and the judge's loss by position, as tables and as a chart."""
    rows = [
        (
            v.label,
            [
                str(v.continuation.nats_per_token),
                str(v.continuation.bits_per_byte or "–"),
                str(v.above_human or "–"),
                str(v.repeated or "–"),
            ],
        )
        for v in quality.verdicts
    ]
    columns = ["nats per judge token", "bits per byte", "nats per byte above human", "repeated 8-grams"]
    P = quality.prompt_tokens
    W = quality.verdicts[0].by_position[-1].end - P
    title = f"{quality.documents} continuations of {W:,} tokens after {P:,}, judged by {quality.judge}"
    overview = Grid(title, "writer", columns, rows)
    labels = [v.label for v in quality.verdicts]
    bins: list[tuple[str, list[str]]] = []
    for i, place in enumerate(quality.verdicts[0].by_position):
        scores = [v.by_position[i].score for v in quality.verdicts]
        cells = [f"{s.nats_per_token}" + (f" | {s.bits_per_byte.mean:.3f}" if s.bits_per_byte else "") for s in scores]
        bins.append((f"{place.start:,}–{place.end:,}" + (" (prompt)" if place.end <= P else ""), cells))
    color = colors([v.writer for v in quality.verdicts])
    lines = [
        estimate_line(
            v.label,
            [(row.end, row.score.nats_per_token) for row in v.by_position],
            color[v.writer],
            v.reading in ("frozen", "human"),
        )
        for v in quality.verdicts
    ]
    name = f"Loss of the judge {quality.judge} by position"
    chart = Chart("judged_loss_by_position", name, "end of the bin, tokens", "nats per judge token", lines, log_x=False)
    by_position = Grid("By position: nats per judge token | bits per byte", "tokens", labels, bins)
    return Figures([overview, by_position], [chart], quality.notes)


def decoding_notes(writings: Sequence[WrittenTexts], tokenizer: Tokenizer, judge: Judge) -> list[str]:
    """Notes for a reader of the figures: another tokenizer, text that is none, readings that broke down."""
    notes = []
    if judge.tokenizer.fingerprint != tokenizer.fingerprint:
        notes.append(
            f"{judge.name} has a tokenizer of its own: the text was encoded anew, and nats per token are per token of "
            "the judge."
        )
        for writing in writings:
            text = "".join(tokenizer.decode(row) for row in writing.tokens[:, writing.prompt_tokens :].tolist())
            broken = text.count("\N{REPLACEMENT CHARACTER}")
            if broken > 0.01 * len(text):
                notes.append(
                    f"{writing.label}: {broken:,} of {len(text):,} characters written are not valid UTF-8; the judge "
                    "saw U+FFFD in their place."
                )
    return notes + [
        f"{writing.label}: {len(lost)} of {len(writing.tokens)} readings were no longer finite, the first after "
        f"{min(lost):,} tokens; what was written from there on is arbitrary."
        for writing in writings
        if (lost := [position for position in writing.diverged_at if position is not None])
    ]


def _judge_ids(judge: Judge, tokenizer: Tokenizer, row: np.ndarray) -> tuple[list[int], str]:
    """A text as the judge reads it, BOS first if it has one, and the text."""
    text = tokenizer.decode(row.tolist())
    if judge.tokenizer.fingerprint == tokenizer.fingerprint:
        return row.tolist(), text
    return judge.tokenizer.beginning + judge.tokenizer.encode(text), text


def _sums(judge: Judge, tokenizer: Tokenizer, writing: WrittenTexts, bins: int, batch_size: int) -> np.ndarray:
    """Nats, judge tokens and bytes in each bin of each document, [N, bins, 3]."""
    N, T = writing.tokens.shape
    edges = np.array([T * i // bins for i in range(bins + 1)])
    table = np.zeros((N, bins, 3))
    same = judge.tokenizer.fingerprint == tokenizer.fingerprint
    for rows in _alike(judge, tokenizer, writing, 1 if not same else batch_size):
        nll = judge.nll(torch.tensor([ids for _, ids in rows])).numpy()
        for (i, ids), losses in zip(rows, nll, strict=True):
            # where the text stood after so many tokens of the writer, in bytes
            ends = [_num_bytes(tokenizer.decode(writing.tokens[i, :edge].tolist()), 1 if same else 3) for edge in edges]
            reached = np.maximum.accumulate(ends)
            if same:
                place = np.searchsorted(edges, np.arange(T), side="right") - 1
                sizes = np.diff(reached)
            else:
                bos = int(judge.tokenizer.bos_id is not None)
                text = tokenizer.decode(writing.tokens[i].tolist())
                lengths = np.array([0] * bos + judge.tokenizer.encode_with_bytes(text)[1])
                first_byte = np.cumsum(lengths) - lengths
                place = np.clip(np.searchsorted(reached, first_byte, side="right") - 1, 0, bins - 1)
                sizes = np.bincount(place[1:], lengths[1:], bins)
            scored = np.arange(len(ids)) > 0
            losses = np.where(np.isfinite(losses), losses, math.inf)
            np.add.at(table[i, :, 0], place[scored], losses[scored])
            np.add.at(table[i, :, 1], place[scored], 1)
            table[i, :, 2] = sizes
    return table


def _num_bytes(text: str, replaced: int) -> int:
    """UTF-8 bytes of a text, each U+FFFD counted as `replaced`: it is 3 to a judge who reads the text, but a judge of
    the tokens was given the bytes in whose place it stands, most often a single one."""
    return len(text.encode()) + (replaced - 3) * text.count("\N{REPLACEMENT CHARACTER}")


def _alike(
    judge: Judge, tokenizer: Tokenizer, writing: WrittenTexts, batch_size: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Documents that the judge can read side by side: (index, its tokens)."""
    for first in range(0, len(writing.tokens), batch_size):
        members = range(first, min(first + batch_size, len(writing.tokens)))
        yield [(i, _judge_ids(judge, tokenizer, writing.tokens[i])[0]) for i in members]


def _verdict(writing: WrittenTexts, table: np.ndarray, human: np.ndarray | None, bins: int) -> JudgeVerdict:
    T = writing.tokens.shape[1]
    first = _prompt_bins(bins, writing.prompt_tokens, T) or bins
    edges = [T * i // bins for i in range(bins + 1)]
    by_position = [BinScore(a, b, _score(table[:, i])) for i, (a, b) in enumerate(pairwise(edges))]
    above = None
    if human is not None and writing.reading != "human":
        own, reference = (sums[:, first:].sum(1) for sums in (table, human))
        per_byte = [sums[:, 0] / np.maximum(sums[:, 2], 1) for sums in (own, reference)]
        above = ratio(per_byte[0] - per_byte[1], np.ones(len(own)))
    return JudgeVerdict(
        writing.writer,
        writing.reading,
        _score(table[:, :first].sum(1)),
        _score(table[:, first:].sum(1)),
        above,
        _repeated(writing.tokens[:, writing.prompt_tokens :]),
        by_position,
        writing.seconds,
    )


def _score(sums: np.ndarray) -> Score:
    """Of [N, 3] nats, tokens and bytes."""
    nats, tokens, num_bytes = sums.T
    nothing = Estimate(math.nan, None, None, 0)
    return Score(ratio(nats, tokens) or nothing, ratio(nats / math.log(2), num_bytes))


def _repeated(tokens: np.ndarray) -> Estimate | None:
    windows = [list(zip(*(row[i:] for i in range(REPEATED_LENGTH)), strict=False)) for row in tokens.tolist()]
    return ratio(np.array([len(w) - len(set(w)) for w in windows]), np.array([len(w) for w in windows]))
