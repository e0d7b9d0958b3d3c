"""The model in the box: it opens, fits, and reads as well as its card says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from examples.read import held_out_modules, main as read_demo, unseen_library

from longread.loading import OpenModel, open_model
from longread.session import Session

BOX = Path(__file__).parents[1] / "models" / "longread-small"
TEXT = "def add(first, second):\n    return first + second\n\n\nHe said that it was a very fine day. "


@pytest.fixture(scope="module")
def opened() -> OpenModel:
    return open_model(str(BOX), "cpu")


def test_it_is_small_and_says_what_it_is(opened: OpenModel) -> None:
    assert (BOX / "model.safetensors").stat().st_size < 16_000_000
    card = (BOX / "README.md").read_text(encoding="utf-8")
    assert f"{opened.model.config.num_parameters:,} parameters" in card
    assert all(f"`{module}`" in card for module in held_out_modules(BOX))
    assert opened.model.dtype == torch.float32  # on a CPU, whatever the file's


def test_it_reads_prose_and_code(opened: OpenModel) -> None:
    ids = opened.tokenizer.encode(TEXT)
    assert opened.tokenizer.decode(ids) == TEXT
    loss = Session(opened.model, opened.inner).read([opened.tokenizer.bos_id or 0, *ids]).nanmean().item()
    assert loss < 0.6 * math.log(opened.model.config.vocab_size)


def test_the_demo_reads_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60, encoding="utf-8")
    assert read_demo([str(text), "--tokens", "1200"]) == 0
    assert "Learning gains" in capsys.readouterr().out
    text.write_text("short", encoding="utf-8")
    assert read_demo([str(text)]) == 2
    assert read_demo([str(tmp_path / "missing")]) == 2


@pytest.mark.slow
def test_its_losses_on_a_library_that_it_has_not_seen(opened: OpenModel) -> None:
    """The figures are those of Python 3.11; another version has other modules."""
    ids = [opened.tokenizer.bos_id or 0, *opened.tokenizer.encode(unseen_library(held_out_modules(BOX)))][:32_768]
    learning, frozen = (
        Session(opened.model, opened.inner, learn=learn).read(ids)[8192:].split((8192, 16_384))
        for learn in (True, False)
    )
    gains = [(b - a).mean().item() for a, b in zip(learning, frozen, strict=True)]
    assert learning[0].mean().item() == pytest.approx(1.574, abs=0.2)
    assert frozen[0].mean().item() == pytest.approx(1.889, abs=0.2)
    assert gains[0] > 0.2
    assert gains[1] > gains[0] - 0.05
