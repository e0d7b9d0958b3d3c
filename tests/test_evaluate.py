"""Figures: where losses are counted, how sure they are, and that they are those of the model."""

from __future__ import annotations

import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from longread.config import InnerConfig, ModelConfig, UserError
from longread.evaluate import (
    Chart,
    Document,
    Figures,
    Line,
    Measurement,
    PositionLoss,
    bin_edges,
    default_lengths,
    html_report,
    measure,
    print_tables,
    ratio,
    summarize,
)
from longread.evaluate.drawing import nice_ticks
from longread.evaluate.estimate import student_quantile
from longread.model import Transformer, initialize
from longread.session import Session

INNER = InnerConfig(lr=0.7, clip=0.5)
M = 4


def model(suffix: int = 2) -> Transformer:
    config = ModelConfig(
        vocab_size=19,
        width=16,
        num_blocks=4,
        num_heads=2,
        mlp_hidden=24,
        window_size=6,
        mini_batch_size=M,
        num_suffix_blocks=suffix,
    )
    made = Transformer(config).double()
    initialize(made, seed=1)
    return made.requires_grad_(False)


def documents(*lengths: int) -> list[Document]:
    draw = np.random.default_rng(0)
    return [
        Document(f"text {i}", draw.integers(19, size=n), np.array([0] + [1 + j % 2 for j in range(n - 1)]))
        for i, n in enumerate(lengths)
    ]


def test_losses_are_counted_where_they_occur() -> None:
    """Position t predicts token t + 1, whatever pieces the text came in."""
    nll = np.arange(100, dtype=float)
    nll[0] = math.nan
    edges = bin_edges([50], [7])
    for cuts in ([], [1], [33, 34], list(range(1, 100))):
        loss = PositionLoss(edges)
        for part, lengths in zip(np.split(nll, cuts), np.split(np.full(100, 2), cuts), strict=True):
            loss.add(part, lengths)
        assert loss.num_positions == 99
        assert loss.total() == (sum(range(1, 100)), 99, 198)
        assert loss.between(7, 8) == (8.0, 1, 2)
        assert loss.between(0, 50) == (sum(range(1, 51)), 50, 100)
        assert loss.between(50, 2**40)[1] == 49


def test_what_is_not_scored_does_not_count() -> None:
    loss = PositionLoss(bin_edges())
    loss.add(np.array([math.nan, 1.0, math.nan, 3.0]))
    assert loss.total() == (4.0, 2, 0)


@pytest.mark.parametrize("freedom", [*range(1, 15), 20, 30, 100, 1000])
def test_student_quantiles(freedom: int) -> None:
    """2.5 % of Student's density lie above, by integration; tabulated ones are rounded to three decimals."""
    x = np.linspace(0, student_quantile(freedom), 20_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    below = np.trapezoid(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), x)
    assert below == pytest.approx(0.475, abs=2e-5 if freedom < 10 else 8e-6)


@pytest.mark.parametrize(
    ("amounts", "sizes", "mean", "half_width"),
    [
        ([1.0, 3.0], [1, 1], 2.0, 12.706 * math.sqrt(2 / 2)),
        ([1.0, 2.0, 6.0], [1, 1, 1], 3.0, 4.303 * math.sqrt(7 / 3)),
        ([5.0, 10.0, 30.0, 15.0], [5, 5, 5, 5], 3.0, 3.182 * math.sqrt(14 / 3 / 4)),
        # residuals -0.75 and 0.75 of two documents, over four tokens
        ([2.0, 9.0, 0.0], [1, 3, 0], 2.75, 12.706 * math.sqrt(2 * 1.125) / 4),
    ],
)
def test_intervals_of_few_documents(amounts: list[float], sizes: list[int], mean: float, half_width: float) -> None:
    """Student's t of the documents' means where sizes are equal; the variance divides by n - 1."""
    estimate = ratio(np.array(amounts), np.array(sizes))
    assert estimate is not None
    assert (estimate.mean, estimate.n) == (mean, sum(size > 0 for size in sizes))
    assert estimate.half_width == pytest.approx(half_width, rel=1e-12)
    assert estimate.low == pytest.approx(mean - half_width, rel=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Documents of unequal length whose loss depends on the document: 95 % of intervals contain the mean."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        sizes = draw.integers(500, 1500, size=12)
        amounts = sizes * (2.0 + 0.3 * draw.standard_normal(12))
        estimate = ratio(amounts, sizes)
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 2.0 <= estimate.high
    assert 920 <= hits <= 980


def test_one_document_says_nothing_about_others() -> None:
    estimate = ratio(np.array([6.0]), np.array([3]))
    assert estimate is not None
    assert (estimate.mean, estimate.low, estimate.n) == (2.0, None, 1)
    assert ratio(np.array([0.0]), np.array([0])) is None


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_documents_read_side_by_side_score_as_alone(learn: bool, batch_size: int) -> None:
    reader = model()
    texts = documents(3 * M + 2, 1, 9 * M + 1, 2, 5 * M)
    found = measure("m", reader, INNER, texts, bin_edges(), learn=learn, batch_size=batch_size)
    for text, loss in zip(texts, found.losses, strict=True):
        alone = Session(reader, INNER, learn=learn).read(torch.from_numpy(text.tokens))
        assert loss.total()[0] == pytest.approx(alone[1:].sum().item(), rel=1e-9)
        assert loss.total()[1:] == (len(text.tokens) - 1, int(text.byte_lengths[1:].sum()))  # type: ignore[index]
    assert found.tokens == sum(len(text.tokens) for text in texts)
    assert found.inner_steps.count == (sum((len(text.tokens) - 1) // M for text in texts) if learn else 0)


def test_boundaries_are_not_scored() -> None:
    texts = documents(20)
    texts[0].tokens[[5, 9]] = 3
    others = (texts[0].tokens[1:] != 3).sum()
    found = measure("m", model(), INNER, texts, bin_edges(), learn=True, bos_id=3)
    assert found.losses[0].total()[1] == others


def test_a_token_the_model_does_not_know_is_refused() -> None:
    texts = documents(10)
    texts[0].tokens[4] = 19
    with pytest.raises(UserError, match="text 0 holds token id 19 but the model knows ids 0 to 18"):
        measure("m", model(), INNER, texts, bin_edges(), learn=True)


@pytest.fixture(scope="module")
def measurements() -> list[Measurement]:
    texts, edges = documents(80, 70, 33, 150), bin_edges([16, 64], [10])
    e2e, plain = model(), model(suffix=0)
    return [
        measure("e2e", e2e, INNER, texts, edges, learn=True),
        measure("e2e", e2e, INNER, texts, edges, learn=False),
        measure("swa", plain, INNER, texts, edges, learn=True),
    ]


def test_figures_side_by_side(measurements: list[Measurement]) -> None:
    evaluation = summarize(measurements, lengths=[16, 64], indices=[10])
    learning, frozen, static = evaluation.results
    assert [r.reading for r in evaluation.results] == ["learning", "frozen", "static"]
    assert (evaluation.documents, evaluation.tokens) == (4, 333)
    # the gain is paired: its mean is the difference, its interval that of the differences
    gain = learning.gain_over_frozen
    assert gain is not None
    assert gain.mean == pytest.approx(frozen.loss.nats_per_token.mean - learning.loss.nats_per_token.mean)
    assert gain.half_width < learning.loss.nats_per_token.half_width
    assert frozen.gain_over_frozen is None
    assert static.health is None
    assert learning.health is not None
    assert learning.health.steps == 79 // M + 69 // M + 32 // M + 149 // M
    # context length T: documents of at least T positions, the loss over the first T
    assert [(row.context_length, row.score.nats_per_token.n) for row in learning.by_context_length] == [
        (16, 4),
        (64, 3),
    ]
    expected = sum(loss.between(0, 64)[0] for loss in measurements[0].losses if loss.num_positions >= 64) / (3 * 64)
    assert learning.by_context_length[1].score.nats_per_token.mean == pytest.approx(expected)
    # its last half: positions T/2 to T, the losses of tokens T/2 + 1 to T
    for row in learning.by_context_length:
        T = row.context_length
        read = [Session(model(), INNER).read(torch.from_numpy(text.tokens)) for text in documents(80, 70, 33, 150)]
        halves = [nll[T // 2 + 1 : T + 1].mean().item() for nll in read if len(nll) > T]
        assert row.last_half.nats_per_token.mean == pytest.approx(np.mean(halves))
        assert row.last_half.nats_per_token.n == len(halves)
    assert learning.at_index[0].start == 10
    assert learning.at_index[0].score.nats_per_token.mean == pytest.approx(
        np.mean([loss.between(10, 11)[0] for loss in measurements[0].losses])
    )
    bits = learning.loss.bits_per_byte
    assert bits is not None
    nats = sum(loss.total()[0] for loss in measurements[0].losses)
    assert bits.mean == pytest.approx(nats / math.log(2) / sum(loss.total()[2] for loss in measurements[0].losses))


def test_outputs_hold_the_figures(measurements: list[Measurement]) -> None:
    evaluation = summarize(measurements, lengths=[16, 64], notes=["A note with <angle> brackets."])
    mean = f"{evaluation.results[0].loss.nats_per_token.mean:.3f}"
    text = io.StringIO()
    print_tables(evaluation, Console(file=text, width=200))
    assert mean in text.getvalue()
    assert "A note with <angle> brackets." in text.getvalue()
    again = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert f"{again['results'][0]['loss']['nats_per_token']['mean']:.3f}" == mean
    training = Chart("training", "Training loss", "step", "nats per token", [Line("e2e", [(1, 3.0), (2, 2.5)])])
    page = html_report(evaluation, title="A <title>", lead="Lead.", more=Figures([], [training]))
    assert page.startswith("<!doctype html>")
    assert mean in page
    assert "A &lt;title&gt;" in page
    assert "&lt;angle&gt;" in page
    assert "<script" not in page
    headings = ("Loss by position", "Loss by context length", "Training loss")
    for name, heading in itertools.product(("wide", "narrow"), headings):
        assert f'<svg class="chart {name}" viewBox=' in page
        assert page.count(f'aria-label="{heading}"') == 2
    for result in evaluation.results:
        assert f"{result.fast_weights:,}" in page
        for row in result.by_context_length:
            assert f"{row.last_half.nats_per_token.mean:.3f}" in page


def test_a_report_of_almost_nothing_is_a_report() -> None:
    found = measure("m", model(), INNER, documents(1), bin_edges(), learn=True)
    evaluation = summarize([found])
    json.dumps(evaluation.as_json(), allow_nan=False)
    assert "<!doctype html>" in html_report(evaluation, title="One token")


def test_default_lengths_are_powers_of_two() -> None:
    assert default_lengths(5000) == [1024, 2048, 4096]
    assert default_lengths(1023) == []


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.23, 1.29), (-5.0, 700.0), (3.0, 3.0000001)])
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
