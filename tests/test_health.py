"""Health of the inner loop along a text; readings that diverge; other windows and mini-batches at reading time."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from longread.checkpoint import save_model
from longread.cli import main
from longread.config import InnerConfig, ModelConfig
from longread.evaluate import Document, bin_edges, health_figures, html_report, measure, print_figures, summarize
from longread.evaluate.health import StepsByPosition, settle
from longread.inner_loop import begin, read
from longread.model import Transformer, initialize
from longread.session import Session
from longread.tokenizer import ByteTokenizer

INNER = InnerConfig(lr=0.7, clip=0.05)
M = 4


def model(suffix: int = 2, attention: str = "window", window: int = 6, mini_batch: int = M) -> Transformer:
    config = ModelConfig(
        vocab_size=257,
        width=16,
        num_blocks=4,
        num_heads=2,
        mlp_hidden=24,
        window_size=window,
        mini_batch_size=mini_batch,
        num_suffix_blocks=suffix,
        attention=attention,  # type: ignore[arg-type]
    )
    made = Transformer(config).double()
    initialize(made, seed=1)
    return made.requires_grad_(False)


def documents(*lengths: int) -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document(f"text {i}", draw.integers(256, size=n)) for i, n in enumerate(lengths)]


def test_steps_are_counted_where_they_were_taken() -> None:
    """Step i is taken after (i + 1) M tokens, whatever pieces its document came in."""
    texts = documents(70, 33)
    found = measure("m", model(), INNER, texts, bin_edges(), learn=True, close=True)
    norms = [
        read(model(), begin(model()), torch.from_numpy(t.tokens)[None], inner=INNER).inner_grad_norm[0] for t in texts
    ]
    summed = summarize([found]).results[0].health
    assert summed is not None
    assert sum(b.steps for b in summed.by_position) == summed.steps == 69 // M + 32 // M
    third = next(b for b in summed.by_position if b.start == 16)  # after 16, 20, 24, 28 tokens
    expected = torch.stack([n[3:7] for n in norms])
    assert (third.end, third.steps) == (32, 8)
    assert third.mean_gradient_norm == pytest.approx(expected.mean().item())
    assert third.largest_gradient_norm == pytest.approx(expected.max().item())
    assert third.clipped_share == pytest.approx((expected > 0.05).double().mean().item())


def test_drift_from_weights_of_zero_is_a_number() -> None:
    still = model()
    for block in still.suffix:
        block.fast_mlp.gate.weight.zero_()
        block.fast_mlp.up.weight.zero_()
        block.fast_mlp.down.weight.zero_()
    found = measure("m", still, INNER, documents(70, 33), bin_edges(), learn=True)
    assert found.drift
    assert {value for values in found.drift.values() for value in values} == {0.0}


def test_drift_is_that_of_a_session_at_each_position() -> None:
    text = documents(70)[0]
    found = measure("m", model(), INNER, [text], bin_edges(), learn=True, close=True)
    assert set(found.drift) >= {M, 2 * M, 4 * M, 8 * M, 16 * M, 70}
    for position, (drift,) in found.drift.items():
        session = Session(model(), INNER)
        session.read(text.tokens[:position])
        assert drift == pytest.approx(session.drift())
    near = measure("m", model(), INNER, [text], bin_edges(), learn=True)
    assert near.losses[0].total()[0] == pytest.approx(found.losses[0].total()[0])


def test_a_reading_that_diverges_is_reported_and_not_averaged_away() -> None:
    """A rate that overflows: the losses are infinite from there on, in figures, tables, charts and JSON."""
    texts = [*documents(70), Document("short", np.arange(3))]
    wild = InnerConfig(lr=1e300, clip=None)
    found = measure("m", model(), wild, texts, bin_edges(), learn=True)
    frozen = measure("m", model(), wild, texts, bin_edges(), learn=False)
    assert not frozen.diverged
    (lost,) = found.diverged
    assert lost.document == "text 0"
    assert M < lost.position <= 2 * M + 1
    assert lost.gradient_norm is not None
    assert found.losses[0].total()[0] == math.inf
    assert math.isfinite(found.losses[1].total()[0])
    assert found.losses[0].total()[1] == 69  # every position still counts
    evaluation = summarize([found, frozen])
    assert evaluation.results[0].loss.nats_per_token.mean == math.inf
    assert (
        f"m, learning: 1 of the readings were no longer finite, the first text 0 after {lost.position}"
        in (evaluation.notes[0])
    )
    table = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert table["results"][0]["diverged"][0]["position"] == lost.position
    assert table["results"][0]["loss"]["nats_per_token"]["mean"] is None
    assert "no longer finite" in html_report(evaluation, title="t")
    text = io.StringIO()
    print_figures(health_figures(evaluation), Console(file=text, width=160))
    assert "Readings that are no longer finite" in text.getvalue()
    assert "short" not in text.getvalue()


def test_where_a_piece_diverges() -> None:
    nan, scored = math.nan, np.ones(8, dtype=bool)
    fine = np.array([nan, 1, 1, 1, 1, 1, 1, 1.0])

    def at(nll: np.ndarray, norms: list[float], start: int = 0) -> tuple[int, float | None] | None:
        losses, found = settle("d", nll, scored, np.array(norms), start=start, M=4)
        assert np.isfinite(losses[scored][1:]).all() == np.isfinite(nll[scored][1:]).all()
        assert np.isnan(losses[scored]).sum() <= (start == 0)
        return None if found is None else (found.position, found.gradient_norm)

    assert at(fine, [0.5]) is None  # the first token of all has no loss
    assert at(fine[::-1], [0.5]) == (7, 0.5)
    assert at(fine, [0.5, math.inf]) == (8, math.inf)
    assert at(fine, [0.5, 0.4], start=16) == (16, 0.5)  # the step on tokens 12 to 15 came before its token
    assert at(fine, [], start=16) == (16, None)
    scored[:] = False
    assert at(fine, [0.5], start=16) is None


def test_the_command_that_reads_rolls_such_steps_back_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ByteTokenizer()
    save_model(
        tmp_path / "m", model().float(), InnerConfig(lr=1e38, clip=None), tokenizer_fingerprint=tokenizer.fingerprint
    )
    tokenizer.save(tmp_path / "m")
    (tmp_path / "text.txt").write_text("A text that goes on for a while. " * 8)
    command = ["read", tmp_path / "text.txt", "--model", tmp_path / "m", "--json", tmp_path / "r.json"]
    assert main([str(a) for a in command]) == 0
    out = " ".join(capsys.readouterr().out.split())
    steps = 265 // model().config.mini_batch_size - (265 % model().config.mini_batch_size == 0)
    assert f"{steps} of {steps} inner steps would have done damage and were rolled back" in out
    learning, frozen = json.loads((tmp_path / "r.json").read_text())["results"]
    assert learning["loss"]["nats_per_token"]["mean"] == pytest.approx(frozen["loss"]["nats_per_token"]["mean"])
    assert frozen["loss"]["nats_per_token"]["mean"] < 10


def test_norms_that_are_not_finite_do_not_hide_the_others() -> None:
    steps = StepsByPosition(1.0, 4)
    steps.add(np.array([2.0, math.nan, 0.5]), 0)
    assert [(b.start, b.steps, b.mean_gradient_norm, b.clipped_share) for b in steps.bins()] == [
        (4, 1, 2.0, 1.0),
        (8, 1, 0.5, 0.0),
    ]


def stored(directory: Path, suffix: int = 2, attention: str = "window") -> Path:
    tokenizer = ByteTokenizer()
    save_model(directory, model(suffix, attention).float(), INNER, tokenizer_fingerprint=tokenizer.fingerprint)
    tokenizer.save(directory)
    return directory


def test_health_and_other_ways_of_reading_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("A text that goes on for a while. " * 3)
    directory = stored(tmp_path / "m")
    command = ["evaluate", directory, "--data", tmp_path / "text.txt", "--health", "--window", 6, 12]
    command += ["--mini-batch", 4, 8, "--json", tmp_path / "e.json", "--plots", tmp_path / "plots"]
    command += ["--report", tmp_path / "e.html", "--no-control", "--device", "cpu"]
    assert main([str(a) for a in command]) == 0
    assert "Drift of the fast weights" in capsys.readouterr().out
    figures = json.loads((tmp_path / "e.json").read_text())
    names = [r["model"] for r in figures["results"]]
    assert names == [f"m, window {K}, mini-batch {b}" for K in (6, 12) for b in (4, 8)]
    tokens = torch.tensor([256, *b"A text that goes on for a while. " * 3])
    for result, (K, b) in zip(figures["results"], [(6, 4), (6, 8), (12, 4), (12, 8)], strict=True):
        reader = model(window=K, mini_batch=b).float()
        expected = Session(reader, INNER).read(tokens)[1:].mean().item()
        assert result["loss"]["nats_per_token"]["mean"] == pytest.approx(expected, rel=1e-5)
        assert result["health"]["steps"] == (len(tokens) - 1) // b
        assert result["health"]["by_position"][0]["start"] == b
    assert {"drift.png", "inner_gradient_norm.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}
    assert "Gradient norm of inner steps" in (tmp_path / "e.html").read_text()


@pytest.mark.parametrize(
    ("suffix", "attention", "option", "reason"),
    [
        (2, "full", "--window", "has full attention in every block; leave it out, or leave out --window"),
        (0, "window", "--mini-batch", "learns nothing while it reads; leave it out, or leave out --mini-batch"),
    ],
)
def test_what_cannot_be_read_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: int, attention: str, option: str, reason: str
) -> None:
    (tmp_path / "text.txt").write_text("A short text.")
    directory = stored(tmp_path / "m", suffix, attention)
    assert main(["evaluate", str(directory), "--data", str(tmp_path / "text.txt"), option, "8"]) == 2
    assert reason in capsys.readouterr().err
