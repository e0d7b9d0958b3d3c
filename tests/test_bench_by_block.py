"""Full attention over more than a cache for all blocks holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longread.bench import by_block, cases
from longread.bench.cases import Case
from longread.bench.machine import Machine
from longread.bench.prefill import read_whole
from longread.bench.report import markdown
from longread.bench.run import run_cases
from longread.model import Transformer
from longread.recipes import recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"kv_heads": 1, "attention_soft_cap": 3.0}])
def test_a_block_after_the_other_reads_what_all_at_once_read(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 8 tokens, and by few heads at a time, the last of them fewer."""
    monkeypatch.setattr(by_block, "PIECE", 8)
    monkeypatch.setattr(by_block, "ADDRESSABLE", 4000)
    config = dataclasses.replace(recipe("toy", "full").model, num_heads=4, **changes)
    model = Transformer(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text = torch.randint(config.vocab_size, (2, 21))
    expected = read_whole(model, text)[0]
    found = by_block.read_by_block(model, text)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.fixture
def little_cache(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(cases, "LONGEST_CACHE", 64)
    machine = Machine("a machine", "float32", 1e12, 1e10)
    monkeypatch.setattr("longread.bench.run.measure_machine", lambda device: machine)
    monkeypatch.setattr("longread.bench.run._gate", lambda *_: True)
    return Case("prefill", "full", "toy", 96)


def test_one_block_stands_for_all(little_cache: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longread.bench.prefill.seconds", lambda device, work: 2.0)
    outcome = run_cases([little_cache], CPU, repeats=3)
    (row,) = outcome.rows
    blocks = little_cache.network.num_blocks
    assert row["blocks"] == blocks > 1
    assert row["value"] == pytest.approx(2e3 * blocks / 96 * 1024)
    assert f"full attention, one block × {blocks}" in markdown(outcome, command="", hardware=None)


def test_a_block_that_is_wrong_is_red(little_cache: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """(In drawn weights of this size, what attention adds is too small to be seen.)"""
    monkeypatch.setattr(by_block, "pass_block", lambda model, block, x: x.zero_())
    outcome = run_cases([little_cache], CPU, repeats=1)
    assert outcome.red
    assert not outcome.rows
