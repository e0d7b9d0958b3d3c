"""The model in the box: it opens, fits, and reads as well as its card says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longread.cli.demo import unseen_library
from longread.loading import OpenModel, boxed_models, open_model

NAME = "longread-small"
BOX = Path(__file__).parents[1] / "models" / NAME
TEXT = "def add(first, second):\n    return first + second\n\n\nHe said that it was a very fine day. "


@pytest.fixture(scope="module")
def opened() -> OpenModel:
    return open_model(NAME, "cpu")


def test_it_is_small_and_says_what_it_is(opened: OpenModel) -> None:
    assert (BOX / "model.safetensors").stat().st_size < 16_000_000
    card = (BOX / "README.md").read_text(encoding="utf-8")
    assert f"{opened.model.config.num_parameters:,} parameters" in card
    assert all(f"`{module}`" in card for module in opened.provenance["held_out_modules"])
    assert boxed_models() == {NAME: BOX}
    assert opened.model.dtype == torch.float32  # on a CPU, whatever the file's


def test_it_reads_prose_and_code(opened: OpenModel) -> None:
    ids = opened.tokenizer.encode(TEXT)
    assert opened.tokenizer.decode(ids) == TEXT
    loss = opened.session().read(TEXT).mean().item()
    assert loss < 0.6 * math.log(opened.model.config.vocab_size)


@pytest.mark.slow
def test_its_losses_on_a_library_that_it_has_not_seen(opened: OpenModel) -> None:
    """The figures are those of Python 3.11; another version has other modules."""
    ids = [*opened.tokenizer.beginning, *opened.tokenizer.encode(unseen_library(opened))][:32_768]
    learning, frozen = (opened.session(learn=learn).read(ids)[8192:].split((8192, 16_384)) for learn in (True, False))
    gains = [(b - a).mean().item() for a, b in zip(learning, frozen, strict=True)]
    assert learning[0].mean().item() == pytest.approx(1.574, abs=0.2)
    assert frozen[0].mean().item() == pytest.approx(1.889, abs=0.2)
    assert gains[0] > 0.2
    assert gains[1] > gains[0] - 0.05
