"""The estimates of memory as numbers, by the rules that the documentation gives."""

from __future__ import annotations

import dataclasses

import pytest

from longread.config import ModelConfig
from longread.model import Transformer
from longread.outer_loop import UPDATE_BYTES, Fit, activation_budget, choose_recompute, fit, graph_bytes, num_trained
from longread.outer_loop.memory import block_bytes, head_bytes, step_bytes
from longread.train.optimizer import freeze_below
from tests.test_outer_loop import CPU, small
from tests.test_outer_memory import a_run

D, F, N, V, K, M = 16, 24, 2, 19, 6, 4
"""Of the small network: width, of the MLP, heads, vocabulary, window, mini-batch. Two of its four blocks learn."""
FAST = 2 * 3 * 16 * 24
"""Numbers of its fast weights."""


def bytes_of(mixer: str, *, itemsize: int = 4, kernels: bool = True, context: int = 40, **changes: object) -> int:
    config: ModelConfig = small(mixer=mixer, **{"num_suffix_blocks": 0} | changes)
    return block_bytes(config, context, itemsize, kernels=kernels)


def test_bytes_of_a_block() -> None:
    """A token's numbers in the type of the products, and of recurrences in float32 at least; 3 F of the MLP."""
    assert bytes_of("attention") == 4 * (13 * D + 3 * F)
    assert bytes_of("attention", itemsize=2) == 2 * (13 * D + 3 * F)
    assert bytes_of("ttt_kvb", itemsize=2) == 2 * (63 * D + 3 * F)
    for mixer in ("mamba2", "gated_deltanet"):  # in every second block, attention in the others
        assert bytes_of(mixer, itemsize=2) == (2 * 38 * D + 4 * 25 * D) // 2 + 2 * 3 * F
        assert bytes_of(mixer, itemsize=8) == 8 * ((38 + 25) * D // 2 + 3 * F)


def test_a_window_shorter_than_the_sequence_costs_more_without_kernels() -> None:
    narrow, wide = 4 * (13 * D + 3 * F), 4 * (26 * D + 3 * F)
    assert bytes_of("attention", kernels=False) == wide
    assert bytes_of("attention", kernels=False, context=K + 1) == wide
    assert bytes_of("attention", kernels=False, context=K) == narrow
    assert bytes_of("attention", kernels=False, attention="full") == narrow
    assert bytes_of("ttt_kvb", kernels=False, itemsize=2) == 2 * (76 * D + 3 * F)


@pytest.mark.parametrize(("learning", "attentions"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_bytes_of_a_step(learning: int, attentions: int) -> None:
    """The lowest block that learns attends for the whole sequence at once, before the steps."""
    config, B = small(num_suffix_blocks=learning), 3
    weights = B * learning * 3 * D * F * 4
    for itemsize in (2, 4):
        past = attentions * 2 * B * K * D * itemsize
        numbers = learning * (44 * D + 20 * F) + attentions * 5 * N * (K + M)
        assert step_bytes(config, B, itemsize) == (B * M * numbers * itemsize + 3 * weights, weights + past)
        numbers = learning * (22 * D + 10 * F) + attentions * 16 * D + V
        held = weights * itemsize // 4
        assert step_bytes(config, B, itemsize, kernels=True) == (B * M * numbers * itemsize + held, weights + past)


def test_bytes_of_a_graph() -> None:
    """10 mini-batches of 2 sequences: all of them, a root of their number, or one at a time; blocks once or again.

    Of a number, blocks beyond it are kept, and steps beyond it with a carry for each segment that is no longer.
    """
    tokens, block, hidden = 2 * 40, 4 * (13 * D + 3 * F), 4 * D
    step, carry = 2 * M * (2 * (22 * D + 10 * F) + 16 * D + V) * 4 + 2 * FAST * 4, 2 * FAST * 4 + 2 * 2 * K * D * 4
    shape = {"batch_size": 2, "context_length": 40, "itemsize": 4, "kernels": True}
    again = tokens * (6 * hidden + block)  # inputs of three blocks and the results of their attention
    passing = 2 * 2 * M * V * 4
    need = graph_bytes(small(), "end-to-end", **shape)
    meant = {
        "none": 3 * tokens * block + 10 * step + passing,
        "1-blocks": 2 * tokens * (hidden + block) + 10 * step + passing,
        "2-blocks": tokens * (4 * hidden + block) + 10 * step + passing,
        "blocks": again + 10 * step + passing,
        "1-steps": again + 9 * step + 2 * carry + passing,
        "5-steps": again + 5 * step + 2 * carry + passing,
        "sqrt": again + 4 * step + 3 * carry + passing,
        "7-steps": again + 3 * step + 4 * carry + passing,
        "step": again + step + 10 * carry + passing,
        "all": tokens * (3 * hidden + block) + 4 * step + 3 * carry + passing,
    }
    assert {schedule: need[schedule] for schedule in meant} == meant
    assert len(need) == 5 + 3 + 9
    assert [need[name] for name in ("3-blocks", "6-steps", "9-steps")] == [need[n] for n in ("blocks", "sqrt", "step")]
    logits = 3 * tokens * V * 4  # of the whole sequence, before the first block runs again
    need = graph_bytes(small(), "static", **shape)
    assert need["none"] == 4 * tokens * block + logits
    assert need["3-blocks"] == tokens * (6 * hidden + block) + logits
    assert need["blocks"] == tokens * 8 * hidden + max(tokens * block, logits)
    assert {need[schedule] for schedule in ("4-blocks", "1-steps", "9-steps", "all")} == {need["blocks"]}


def test_bytes_of_logits() -> None:
    """With kernels they are kept where they fit into 1 GiB, and are made in pieces of that; on CPUs in narrow ones."""
    config = small(vocab_size=2**17)
    assert head_bytes(config, 2**12, 2, kernels=True) == (2**30, 2**31)
    assert head_bytes(config, 2**12 + 1, 2, kernels=True) == (0, 2**31)
    assert head_bytes(config, 10, 2, kernels=False) == (0, 3 * 10 * 16_384 * 4)
    assert head_bytes(small(), 10, 8, kernels=False) == (0, 3 * 10 * V * 8)


def test_bytes_where_heads_share_keys_and_fast_mlps_are_narrow() -> None:
    """Of 4 heads of 6 with 2 for keys and values: queries have 24 numbers, keys 12, whatever the width is."""
    config = small(num_heads=4, head_size=6, kv_heads=2, fast_hidden=8, post_norm=False, qk_norm=False)
    Q, E, units = 24, 12, F + 8
    assert block_bytes(config, 40, 2, kernels=True) == 2 * (4 * D + 3 * Q + 2 * E + 3 * F)
    assert block_bytes(config, 40, 2, kernels=False) == 2 * (4 * D + 8 * Q + 10 * E + 3 * F)
    bare = dataclasses.replace(config, pre_norm=False, block_windows=(0, 40, 4, 6), attention="full")
    assert block_bytes(bare, 40, 2, kernels=False) * 4 == 2 * (
        4 * (2 * D + 3 * Q + 2 * E + 3 * F) + 2 * (5 * Q + 8 * E)
    )
    weights = 2 * 3 * D * 8 * 4
    past = 2 * K * E * 2
    held = weights // 2 + M * V * 2
    assert step_bytes(config, 1, 2, kernels=True) == (
        M * (2 * (22 * D + 5 * units) + 4 * D + 6 * Q + 6 * E) * 2 + held,
        weights + past,
    )
    narrow = dataclasses.replace(config, block_windows=(0, 0, 0, 3))
    assert step_bytes(narrow, 1, 2)[1] == weights + past // 2


def test_below_the_lowest_trained_block_nothing_is_kept_and_nothing_updated() -> None:
    shape = {"batch_size": 2, "context_length": 40, "itemsize": 4, "kernels": True}
    block = 2 * 40 * 4 * (13 * D + 3 * F)
    whole, three, two, one = (
        graph_bytes(small(), "end-to-end", trained_blocks=n, **shape)["none"] for n in (None, 3, 2, 1)
    )
    assert (whole - three, three - two, two - one) == (block, block, block)  # the lowest attention that learns is one
    static = [graph_bytes(small(), "static", trained_blocks=n, **shape)["none"] for n in (4, 3, 1)]
    assert (static[0] - static[1], static[1] - static[2]) == (block, 2 * block)
    assert graph_bytes(small(), "static", trained_blocks=4, **shape) == graph_bytes(small(), "static", **shape)
    for config in (small(), small(tie_embeddings=False), small(num_suffix_blocks=1)):
        for blocks in (None, 1, 2, 3, 4):
            model = Transformer(config)
            freeze_below(model, blocks)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert num_trained(config, blocks) == count
        assert activation_budget(10**9, config, 1) == 8 * 10**8 - 12 * num_trained(config, 1)


def test_what_the_update_needs_is_twelve_bytes_a_parameter() -> None:
    """A gradient and two moments of four bytes; and a fifth of the memory is not counted on."""
    assert UPDATE_BYTES == 12
    assert activation_budget(10**9, small()) == 8 * 10**8 - 12 * small().num_parameters


def test_what_fits_exactly_misses_nothing() -> None:
    config = dataclasses.replace(a_run(), micro_batch_size=12, recompute="none")
    need = graph_bytes(small(), "end-to-end", batch_size=12, context_length=16, itemsize=4, kernels=False)["none"]
    for budget, missing in ((need, 0), (need + 7, 0), (need - 0.5, 1), (need - 7, 7)):
        assert fit(config, itemsize=4, kernels=False, budget=budget).missing == missing
    need = graph_bytes(small(), "end-to-end", batch_size=1, context_length=16, itemsize=4, kernels=False)
    assert fit(a_run(), itemsize=4, kernels=False, budget=need["none"] - 1) == Fit(1, "1-blocks", 0)


def test_four_fifths_of_what_is_free_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"batch_size": 2, "context_length": 400, "itemsize": 4}
    need = graph_bytes(small(), "end-to-end", kernels=False, **shape)["none"]
    for free, schedule in ((need * 1.25 + 1, "none"), (need * 1.25 - 2, "1-blocks")):
        monkeypatch.setattr("longread.outer_loop.memory.free_bytes", lambda device, free=free: free)
        assert choose_recompute(small(), "end-to-end", device=CPU, **shape) == schedule
