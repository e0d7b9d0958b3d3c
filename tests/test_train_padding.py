"""Training on documents shorter than the context: what is padding counts neither as loss nor as tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longread import checkpoint, train as training
from longread.data import Sampler, TokenDataset, prepare
from longread.model import Transformer
from longread.outer_loop import end_to_end_loss
from longread.tokenizer import ByteTokenizer
from longread.train import train
from tests.test_train import CONFIG, MODEL, change, rows_of, without_timing

LENGTHS = [5, 30, 12, 31, 8, 9, 24, 3, 17, 22, 6, 28]
"""UTF-8 bytes, hence targets, of the documents: all shorter than the context of 32, and than what they fill."""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    home = tmp_path_factory.mktemp("notes")
    (home / "texts").mkdir()
    for i, length in enumerate(LENGTHS):
        (home / "texts" / f"{i:02}.txt").write_text(chr(97 + i) * length)
    return prepare([home / "texts"], home / "data", ByteTokenizer(), documents="reset")


def test_an_untrained_model_costs_ln_v_however_much_is_padding(notes: TokenDataset) -> None:
    model = Transformer(MODEL)
    with torch.no_grad():
        model.embedding.weight.zero_()
    sampler = Sampler(notes, 32, 4, 0)
    for step in range(3):
        found = training.accumulate_gradient(model, CONFIG, sampler.batch(step), inner_lr=1.0)
        assert found.loss.item() == pytest.approx(math.log(257), rel=1e-6)
    for loss in training.validation_losses(model, CONFIG, sampler).values():
        assert loss == pytest.approx(math.log(257), rel=1e-6)


def test_validation_of_padded_text_is_the_loss_of_training(notes: TokenDataset) -> None:
    """The mean over all sequences, not over batches of which some have more sequences with a target."""
    torch.manual_seed(0)
    model, config = Transformer(MODEL).double(), change(inner__warmup_steps=0)
    sampler = Sampler(notes, 32, 4, 3)
    batches = [sampler.batch(i) for i in range(4)]
    batches[1] = batches[1]._replace(loss_mask=batches[1].loss_mask & torch.tensor([[True], [False], [True], [False]]))

    class Fixed:
        def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Any:
            return batches[step]

    found = training.validation_losses(model, config, Fixed())  # type: ignore[arg-type]
    everything = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
    expected = end_to_end_loss(model, *everything, inner_lr=1.0, inner_clip=0.15).loss.item()
    assert found["validation_loss"] == pytest.approx(expected, rel=1e-12)


def test_tokens_are_targets_that_count(notes: TokenDataset, tmp_path: Path) -> None:
    """Three batches of four are an epoch, so six steps learn every document twice."""
    result = train(CONFIG, notes, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [row["tokens"] for row in (rows[2], rows[5])] == [sum(LENGTHS), 2 * sum(LENGTHS)]
    assert result.tokens == 2 * sum(LENGTHS)
    assert checkpoint.load_model(tmp_path / "run").metadata["provenance"]["tokens"] == 2 * sum(LENGTHS)
    counted = [0, *(row["tokens"] for row in rows)]
    for row, before in zip(rows, counted, strict=False):
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens"] - before)


def test_a_resumed_run_counts_on(notes: TokenDataset, tmp_path: Path) -> None:
    train(change(steps=4), notes, tmp_path / "parts")
    train(CONFIG, notes, tmp_path / "parts", resume=True)
    train(CONFIG, notes, tmp_path / "whole")
    assert without_timing(rows_of(tmp_path / "parts")) == without_timing(rows_of(tmp_path / "whole"))
    newest = checkpoint.newest_checkpoint(tmp_path / "parts")
    assert newest is not None
    assert checkpoint.read_checkpoint(newest).state["tokens"] == 2 * sum(LENGTHS)
