"""Which rule of choice keeps a fact that is hidden in a book: losses are read once, then every rule is tried on them.

    python -m benchmarks.kept_choice costs READER --books BOOKS/*.txt --variants 2 3 --out FILE
    python -m benchmarks.kept_choice table FILE [FILE ...]

A text is the beginning of an S-NIAH prompt, then a book with a needle every 1,300 tokens, between two sentences, each
of a key and a value of its own. It is read frozen, with the first run of the text kept and nothing else, so the
announcement that something is hidden stays in sight, as it does where more is kept. A needle counts as kept if its
tokens from the key on are: if they surprise more than all of the book that would compete for the same places, in a
context of so many tokens, but `size` less the first run and the needle. What else is kept would change losses a little;
that is left out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from longread.data import read_texts
from longread.evaluate import VARIANTS, essays, make_samples
from longread.inner_loop import begin, read
from longread.loading import OpenModel, open_model

Costs = NDArray[np.float64]
"""−log p of each token, nats."""
Rule = Callable[[Costs], Costs]
NEEDLES, EVERY, FROM = 20, 1300, 1100
FIRST = 48
"""Tokens that are always kept."""
TO_KEY = 7
"""Tokens of a needle before its key, about."""
AROUND = 70
"""Tokens of the book beside a needle that do not compete: runs of them hold some of the needle."""
CONTEXTS, SIZES = (4096, 16384, 131072), (256, 1024, 4096)
"""The longest is longer than a text: what competes there is taken to be as surprising as in the text."""
WINDOW, MINI_BATCH = 1024, 256


def newest(costs: Costs, run: int) -> Costs:
    """The largest of the `run` newest, a token's own included."""
    return sliding_window_view(np.pad(costs, (run - 1, 0)), run).max(-1)


def mean(costs: Costs, run: int, largest: int | None = None) -> Costs:
    """The largest mean of a run that holds a token, or of so many largest of the run."""
    runs = np.sort(sliding_window_view(np.pad(costs, (run - 1, 0)), run), -1)
    means = runs[:, -(largest or run) :].mean(-1)
    return sliding_window_view(np.pad(means, (0, run - 1), constant_values=-np.inf), run).max(-1)


def capped(costs: Costs, run: int, most: float) -> Costs:
    """The largest mean of a run that holds a token, where none counts for more than `most` nats."""
    return mean(np.minimum(costs, most), run)


def above_usual(
    costs: Costs, runs: Sequence[int], most: float, window: int = WINDOW, mini_batch: int = MINI_BATCH
) -> Costs:
    """The same of runs of several lengths, less the mean of the window, times the root of the length."""
    costs = np.minimum(costs, most)
    begins = np.arange(len(costs)) // mini_batch * mini_batch
    usual = np.array([costs[begin : begin + window].mean() for begin in begins])
    return np.maximum.reduce([(mean(costs, run) - usual) * run**0.5 for run in runs])


def rules() -> dict[str, Rule]:
    """By name; the last ones are that of `longread.inner_loop.kept` with other runs and other nats."""
    found: dict[str, Rule] = {"the largest of the newest 16": lambda costs: newest(costs, 16)}
    found["mean of the 4 largest of 48"] = functools.partial(mean, run=48, largest=4)
    for run in (24, 48):
        found[f"mean of {run}"] = functools.partial(mean, run=run)
        found[f"mean log(1 + cost) of {run}"] = lambda costs, run=run: mean(np.log1p(costs), run)  # type: ignore[misc]
    for most in (1.0, 2.0, 2.5, 3.0, 4.0):
        found[f"at most {most:g} nats, mean of 48"] = functools.partial(capped, run=48, most=most)
    for run in (16, 24, 32, 64):
        found[f"at most 2.5 nats, mean of {run}"] = functools.partial(capped, run=run, most=2.5)
    for most, runs in ((2.5, (48,)), (2.5, (24, 48)), (2.0, (16, 48)), (2.5, (16, 48)), (3.0, (16, 48))):
        named = " and ".join(map(str, runs))
        found[f"at most {most:g} nats, runs of {named} above usual"] = functools.partial(
            above_usual, runs=runs, most=most
        )
    return found


def kept(text: dict[str, Any], rule: Rule, size: int, context: int) -> list[bool]:
    """Of each needle of a text, whether a memory of that size keeps it in such a context."""
    costs = np.array(text["decinats"]) / 10
    surprise, book = rule(costs), np.ones(len(costs), dtype=bool)
    book[:FIRST] = False
    for start, end in text["needles"]:
        book[start - AROUND : end + AROUND] = False
    found = []
    for start, end in text["needles"]:
        share = (size - FIRST - (end - start)) / (context - text["window"])
        least = np.quantile(surprise[book], 1 - share) if 0 < share < 1 else np.inf if share <= 0 else -np.inf
        found.append(bool((surprise[start + TO_KEY : end - 1] > least).all()))
    return found


def tables(texts: Sequence[dict[str, Any]]) -> str:
    """Needles kept, by rule: a table for each variant, a column for each size of the memory and context."""
    lines = []
    for variant in sorted({text["variant"] for text in texts}):
        mine, columns = [text for text in texts if text["variant"] == variant], list(itertools.product(SIZES, CONTEXTS))
        heads = (f"{size} of {context:,}" for size, context in columns)
        total = sum(len(text["needles"]) for text in mine)
        lines += ["", f"| {variant}, kept of {total} | {' | '.join(heads)} |", "|---|" + "--:|" * len(columns)]
        for name, rule in rules().items():
            cells = [str(sum(sum(kept(text, rule, *column)) for text in mine)) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs_of(reader: OpenModel, book: Path, variant: int) -> dict[str, Any]:
    """Losses of one book with needles, in tenths of a nat, and where these lie."""
    opened, chosen = reader.keeping(FIRST, run=FIRST), VARIANTS[variant]
    tokenizer, length = opened.tokenizer, FROM + EVERY * NEEDLES
    hay = essays(read_texts([str(book)]), tokenizer, length + EVERY)
    beginning = make_samples(tokenizer, chosen, hay, 2048, (0.0,), 1, seed=0)[0]
    ids, done = beginning.tokens.tolist()[: beginning.needle_start], 0
    needles: list[tuple[int, int]] = []
    for number in range(NEEDLES):
        sample = make_samples(tokenizer, chosen, hay, 2048, (0.5,), 1, seed=number + 1)[0]
        needle = sample.tokens.tolist()[sample.needle_start : sample.needle_end]
        end = int(hay.gaps[np.abs(hay.gaps - (FROM + EVERY * number)).argmin()])  # between two sentences
        ids, done = ids + hay.tokens[done:end].tolist(), end
        needles.append((len(ids), len(ids) + len(needle)))
        ids += needle
    tokens = torch.tensor([ids + hay.tokens[done:length].tolist()], device=opened.model.device)
    nll = read(opened.model, begin(opened.model), tokens, inner=opened.inner, learn=False).nll[0]
    decinats = (nll.nan_to_num(0.0) * 10).round().int().tolist()
    facts = {"book": book.name, "variant": chosen.name, "window": opened.model.config.window_size}
    return facts | {"needles": needles, "decinats": decinats}


def main() -> None:
    """Reads, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    costs = commands.add_parser("costs")
    costs.add_argument("reader", type=Path)
    costs.add_argument("--books", type=Path, nargs="+", required=True)
    costs.add_argument("--variants", type=int, nargs="+", choices=(2, 3), default=(2, 3))
    costs.add_argument("--out", type=Path, required=True)
    shown = commands.add_parser("table")
    shown.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.what == "table":
        print(tables([text for file in options.files for text in json.loads(file.read_text(encoding="utf-8"))]))
        return
    reader = open_model(options.reader)
    texts = []
    for book, variant in itertools.product(options.books, options.variants):
        texts.append(costs_of(reader, book, variant))
        print(book.name, texts[-1]["variant"], len(texts[-1]["decinats"]), "tokens", flush=True)
        options.out.write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
