"""Rules by which tokens could be kept: they say what the library does, and their page what they give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import kept_choice
from benchmarks.kept_choice import above_usual, capped, kept, mean, newest, rules, tables
from longread.inner_loop.kept import MOST, SHORTER, decided, nothing_kept
from tests.tiny import M, config, make

RESULTS = Path(kept_choice.__file__).parent / "results"
RUN = config().kept_run
RUNS = RUN // SHORTER, RUN
NAME = f"at most {MOST} nats, runs of {RUNS[0]} and {RUNS[1]} above usual"


def test_a_run_counts_for_each_of_its_tokens() -> None:
    costs = np.array([1.0, 5.0, 0.0, 3.0, 2.0, 9.0])
    for run, largest in ((1, None), (3, None), (3, 2), (4, 1)):
        padded = [0.0] * (run - 1) + costs.tolist()
        means = [sum(sorted(padded[i : i + run])[-(largest or run) :]) / (largest or run) for i in range(len(costs))]
        expected = [max(means[i : i + run]) for i in range(len(costs))]
        np.testing.assert_allclose(mean(costs, run, largest), expected)
    assert newest(costs, 3).tolist() == [1, 5, 5, 5, 3, 9]
    np.testing.assert_allclose(capped(costs, 2, 3.0), [2, 2, 1.5, 2.5, 2.5, 2.5])


def test_the_rule_of_the_library_is_among_them() -> None:
    """Tokens that leave the window get the surprise that the rule of that name gives them."""
    assert NAME in rules()
    model = make(3, torch.float64, window_size=60, kept_tokens=99, kept_run=RUN)
    nll = torch.rand(1, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    state = nothing_kept(model, 1).after(nll)
    lower, upper = ([past._make(x.new_zeros(*x.shape[:2], 60, x.shape[3]) for x in past) for past in half]
                    for half in (state.lower, state.upper))  # fmt: skip
    found = decided(model, state, lower, upper, 60)
    assert found.surprise.shape == (1, M)
    expected = above_usual(nll[0].numpy(), RUNS, MOST, window=60, mini_batch=M)
    np.testing.assert_allclose(found.surprise[0].numpy(), expected[:M])


@pytest.mark.parametrize(("cost", "size", "expected"), [(9.0, 60, True), (0.1, 60, False), (9.0, 10, False)])
def test_a_needle_is_kept_where_it_surprises_more_than_the_book(cost: float, size: int, expected: bool) -> None:
    drawn = np.random.default_rng(0).random(2000)
    drawn[500:520] = cost
    text = {"window": 100, "needles": [(500, 520)], "decinats": (drawn * 10).tolist(), "variant": "S-NIAH-2"}
    found = kept(text, lambda costs: mean(np.log1p(costs), 12), kept_choice.FIRST + size, 2000)
    assert found == [expected]


def test_the_page_has_what_the_figures_give(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (RESULTS / "kept-choice_cpu_2026-12-01.md").read_text(encoding="utf-8")
    texts = json.loads((RESULTS / "kept-choice_cpu_2026-12-01.json").read_text(encoding="utf-8"))
    chosen = {name: rules()[name] for name in (NAME, "the largest of the newest 16")}
    monkeypatch.setattr(kept_choice, "rules", lambda: chosen)
    rows = [line for line in tables(texts).splitlines() if line.startswith(("| at most", "| the"))]
    assert len(rows) == 4
    assert all(row in page for row in rows)
