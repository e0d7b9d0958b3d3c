"""The jobs of the experiments with an adapted model: what they need is there, and a rehearsal runs them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.adapted import low_rank, pack, plan, rehearsal
from experiments.adapted.__main__ import PARTS, in_turn, main
from experiments.pages import adapted as page
from experiments.plan import Job

from longread import InnerConfig, ModelConfig, Transformer, end_to_end_loss
from longread.cli import build_parser, main as longread
from longread.data import TokenDataset, prepare
from longread.tokenizer import load_tokenizer, train_bpe


def _jobs(tmp_path: Path, **options: object) -> list[Job]:
    low_rank.register()
    made = plan.Plan(tmp_path / "data", tmp_path, **options)
    for part in PARTS:
        part.jobs(made)
    return made.jobs


def test_every_job_has_what_it_needs_and_leaves_a_file_of_its_own(tmp_path: Path) -> None:
    jobs = _jobs(tmp_path)
    tiers = {job.name: job.tier for job in jobs}
    assert len(tiers) == len(jobs), "names are unique"
    made: set[Path] = set()
    for job in jobs:
        assert all(tiers[need] <= job.tier for need in job.needs), job.name
        assert 0 < job.estimated_seconds < 300
        assert 0 <= job.weight < plan.ROOM
        for command in job.commands:
            if command.arguments[0] != "-m":
                build_parser(command.arguments[0]).parse_args(command.arguments)
            assert command.makes not in made
            made.add(command.makes)


def test_parts_take_turns_within_a_tier() -> None:
    parts = [
        [Job(f"{part}{i}", tier, ()) for i, tier in enumerate(tiers)]
        for part, tiers in (("a", (0, 1, 1, 2)), ("b", (1, 0, 1)))
    ]
    assert [job.name for job in in_turn(parts)] == ["a0", "b1", "a1", "b0", "a2", "b2", "a3"]


def test_the_base_of_the_dials_differs_from_each_in_that_dial_alone(tmp_path: Path) -> None:
    commands = {job.name: job.commands[0].arguments for job in _jobs(tmp_path) if job.experiment == "dials"}
    base = [part.replace("dial-base", "") for part in commands.pop("dial-base")]
    for name, arguments in commands.items():
        changed = [part for part in arguments if part.replace(name, "") not in base]
        expected = next(dial for dial in plan.dials(plan.Plan(tmp_path, tmp_path)) if f"dial-{dial.name}" == name)
        reader = [str(tmp_path / "readers" / f"reader-{expected.name}")] if expected.conversion else []
        assert changed == [*reader, *expected.options[:2], *expected.sets], name


def _weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(2, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


def test_steps_of_low_rank_are_sgd_on_a_factor() -> None:
    """Of A in W + A Pᵀ: the gradient with respect to A is G P."""
    weights, gradients = _weights((6, 5), (5, 6)), _weights((6, 5), (5, 6))
    bases = [low_rank.basis(g.shape[-1], 2, g.device, g.dtype) for g in gradients]
    assert all(torch.allclose(P.mT @ P, torch.eye(2, dtype=torch.float64)) for P in bases)
    lengths = torch.stack([(g @ P).square().sum((1, 2)) for g, P in zip(gradients, bases, strict=True)]).sum(0).sqrt()
    new = low_rank.low_rank(weights, gradients, lr=0.5, clip=0.1, rank=2)
    for w, after, g, P in zip(weights, new, gradients, bases, strict=True):
        assert torch.allclose(after, w - 0.5 * (0.1 / lengths).view(-1, 1, 1) * (g @ P) @ P.mT)
        assert torch.allclose((after - w) @ P @ P.mT, after - w)
    unclipped = low_rank.low_rank(weights, gradients, lr=0.5, clip=None, rank=9)
    assert all(torch.allclose(n, w - 0.5 * g) for n, w, g in zip(unclipped, weights, gradients, strict=True))


@pytest.mark.parametrize("clip", [None, 0.01, 100.0])
def test_the_meta_gradient_goes_through_low_rank_steps(clip: float | None) -> None:
    low_rank.register()
    config = ModelConfig(
        vocab_size=13, width=8, num_blocks=2, num_heads=2, mlp_hidden=8, window_size=4, mini_batch_size=2,
        num_suffix_blocks=1,
    )  # fmt: skip
    model = Transformer(config).double()
    text = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(2))

    def loss() -> torch.Tensor:
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[0, 2:4] = False  # a mini-batch without a target
        inner = InnerConfig(lr=0.7, clip=clip, optimizer="low-rank-16")
        rule = {"inner_lr": inner.lr, "inner_clip": inner.clip, "inner_optimizer": inner.optimizer}
        return end_to_end_loss(model, text[:, :-1], text[:, 1:], mask, **rule).loss

    loss().backward()
    draw = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in model.parameters()]
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True) if p.grad is not None)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += step * d
        values.append(loss().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(expected), rel=1e-5)


def test_a_dial_is_compared_at_equal_tokens_and_at_equal_operations() -> None:
    """Twice the operations buy the base twice the tokens, half of that, half of what they gain, by the logarithm."""

    def model(loss: float, flops: float) -> dict[str, object]:
        return {"learning": {page.AT: loss}, "frozen": {page.AT: 3.5}, "GFLOP a token": flops}

    dials = {"base": model(3.25, 2.0), "a": model(3.0, 4.0), "b": model(3.25, 2.0 * 2**0.5)}
    found = {"models": {"first-order": model(3.125, 2.0)}, "dials": dials, "long text": {}}
    table = next(table for table in page.tables(found) if "One dial" in table.caption)
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    shown = ("below base, 16–32K", "at equal operations", "gain", "operations")
    assert [rows["a"][key] for key in shown] == ["+0.250", "+0.125", "+0.500", "2.00"]
    assert [rows["b"][key] for key in shown] == ["+0.000", "−0.062", "+0.250", "1.41"]
    assert [rows["base"][key] for key in shown] == ["", "", "+0.250", "1.00"]


def test_seeds_are_compared_with_their_own_twins() -> None:
    """And the mean is over the seeds that reach an octave."""

    def reader(learning: float, frozen: float) -> dict[str, object]:
        return {"learning": {page.AT: learning}, "frozen": {page.AT: frozen, "0–1K": 3.0}}

    models = {"first-order": reader(3.0, 3.25), "first-order, seed 1": reader(3.5, 3.625)}
    models |= {"SWA twin": {"static": {page.AT: 3.5}}, "SWA twin, seed 1": {"static": {page.AT: 3.625}}}
    models |= {"SWA twin, seed 2": {"static": {page.AT: 9.0}}}
    table = next(t for t in page.tables({"models": models, "dials": {}, "long text": {}}) if "Seeds" in t.caption)
    assert {row[0]: row[-1] for row in table.rows} == {
        "seed 0, frozen": "+0.250",
        "seed 0, SWA": "+0.500",
        "seed 1, frozen": "+0.125",
        "seed 1, SWA": "+0.125",
        "mean, frozen": "+0.188",
        "mean, SWA": "+0.312",
    }
    assert all(cell == "" for row in table.rows for cell in row[1:-1])


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """PACKED with two books of training and two of validation, made up."""
    draw, words = np.random.default_rng(0), [f"word{i}" for i in range(300)]
    for folder, count in (("train", 4), ("validation", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            text = " ".join(draw.choice(words, 2500))
            (tmp_path / folder / f"{i}.txt").write_text(text, encoding="utf-8")
    train_bpe((path.read_text() for path in (tmp_path / "train").iterdir()), 300).save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "index.json").write_text('{"vocab_size": 300}')
    rehearsal.tiny_llama(tmp_path / "tiny", tmp_path / "tokenizer")
    assert longread(["convert", str(tmp_path / "tiny"), str(tmp_path / "reader"), "--window", "64"]) == 0
    prepare([tmp_path / "train"], tmp_path / "tokens", load_tokenizer(tmp_path / "reader"))
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    arguments = ["--gguf", source, "--tokens", tmp_path / "tokens", "--books", tmp_path / "validation"]
    assert pack.main([str(part) for part in (*arguments, "--out", tmp_path / "pieces")]) == 0
    packed = tmp_path / "packed"
    for piece in ("p1", "p2"):
        for path in (tmp_path / "pieces" / piece).rglob("*.*"):
            place = packed / path.relative_to(tmp_path / "pieces" / piece)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return packed


def test_what_was_packed_is_unpacked(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pieces / "source.gguf.02").write_bytes(b"end")
    pack.unpack(pieces, tmp_path / "data")
    assert (tmp_path / "data" / "source.gguf").read_bytes() == b"GGUF" + bytes(100) + b"end"
    before, after = TokenDataset.open(tmp_path / "tokens"), TokenDataset.open(tmp_path / "data" / "train")
    after.verify()
    assert after.num_documents == before.num_documents // 2
    for i in range(after.num_documents):
        assert np.array_equal(after.document(i), before.document(2 * i))
        assert after.document_bytes(i) == before.document_bytes(2 * i)
    books = TokenDataset.open(tmp_path / "data" / "validation")
    joined = TokenDataset.open(tmp_path / "data" / "joined")
    assert (books.num_documents, joined.num_documents) == (2, 1)
    assert joined.num_tokens == pytest.approx(books.num_tokens, abs=3)


@pytest.mark.slow
def test_a_rehearsal_runs_the_jobs(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--packed", pieces, "--work", tmp_path / "work", "--out", tmp_path / "out", "--rehearse", "--gpus", "0"]
    only = ("first-order", "dial-low-rank-16", "long-first-order")
    _run: Callable[[list[str]], int] = main
    monkeypatch.setattr("sys.argv", ["", *map(str, options), "--seconds", "500", "--only", *only])
    assert _run() == 0
    assert {path.name for path in (tmp_path / "work" / "runs").glob("*/*")} >= {"model", "metrics.jsonl", "run.json"}
    assert not list((tmp_path / "work" / "runs").glob("*/checkpoints")), "they would fill a disk"
    with tarfile.open(tmp_path / "out" / "results.tar.xz") as tar:
        state = json.load(tar.extractfile("state.json"))  # type: ignore[arg-type]
        assert {name: job["status"] for name, job in state["jobs"].items()} == dict.fromkeys((*only, "reader"), "done")
        found = json.load(tar.extractfile("results/long-first-order/joined.json"))  # type: ignore[arg-type]
    learning, frozen = found["results"]
    assert (learning["reading"], frozen["reading"]) == ("learning", "frozen")
    assert len(learning["by_context_length"]) == 16
