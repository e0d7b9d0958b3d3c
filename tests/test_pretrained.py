"""A converted model computes what the pretrained one does, and is read frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.nn import functional

from tests.pretrained_models import (
    TOKENS,
    a_text,
    check_equal,
    converted,
    logits_of,
    losses_of,
    make,
    save,
    wanted,
)


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_way(tied: bool, tmp_path: Path) -> None:
    source = make("llama", tie_word_embeddings=tied, num_key_value_heads=4)
    opened = converted(save(source, tmp_path / "source"), tmp_path / "reader", "--mini-batch", str(TOKENS))
    ids = a_text()
    want = wanted(source, ids)
    check_equal(logits_of(opened, ids), want)
    check_equal(logits_of(opened, ids, learning=True), want)
    nll = functional.cross_entropy(want[0, :-1], ids[0, 1:], reduction="none")
    for learn in (False, True):
        assert (losses_of(opened, ids, learn=learn) - nll).abs().max() < 1e-4
