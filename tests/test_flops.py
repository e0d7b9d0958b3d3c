"""Operations counted from a config: by hand, by the design, and as they run."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig, ModelConfig
from longread.flops import decoding_bytes, reading_flops, sequence_flops, training_flops, visible_keys
from longread.inner_loop import begin, read
from longread.model import Transformer, transformer
from longread.ops.cross_entropy.reference import reference_cross_entropy
from longread.outer_loop import end_to_end_loss, static_loss
from longread.recipes import recipe
from longread.train.optimizer import freeze_below
from tests.products import Products

SMALL = ModelConfig(
    vocab_size=48,
    width=32,
    num_blocks=4,
    num_heads=2,
    mlp_hidden=64,
    window_size=64,
    mini_batch_size=16,
    num_suffix_blocks=1,
    tie_embeddings=False,
)


@pytest.mark.parametrize(
    ("tokens", "window", "expected"), [(1, None, 1), (4, None, 2.5), (4, 2, 7 / 4), (4, 9, 2.5), (3, 1, 1)]
)
def test_visible_keys(tokens: int, window: int | None, expected: float) -> None:
    assert visible_keys(tokens, window) == expected


def test_flops_of_a_network_counted_by_hand() -> None:
    """D 2, F 3, V 5, two blocks, four tokens with a window of two: 7/4 keys visible."""
    config = ModelConfig(
        vocab_size=5,
        width=2,
        num_blocks=2,
        num_heads=1,
        mlp_hidden=3,
        window_size=2,
        mini_batch_size=2,
        num_suffix_blocks=1,
    )
    attention, mlp, head = 32 + 14, 36, 20
    assert training_flops(config, 4, "static") == 3 * (2 * attention + 3 * mlp + head)
    below, last = 3 * (2 * attention + mlp), 3 * (2 * mlp + head)
    inner = 2 * (mlp + head) + (2 + 2 + 3) / 3 * mlp  # gate and up of the lowest fast MLP 2, down 3
    exact, kept = 4 * (mlp + head) + (4 + 4 + 6) / 3 * mlp, 2 * (2 * mlp + head)
    assert sequence_flops(config, 4, "end-to-end") == pytest.approx((2 * inner, 4 * below + 2 * exact + 2 * last, 0))
    assert training_flops(config, 4, "end-to-end") == pytest.approx(below + (inner + exact + last) / 2)
    first_order = sequence_flops(config, 4, "end-to-end", meta_gradient="first-order")
    assert first_order == pytest.approx((2 * inner, 4 * below + 2 * kept + 2 * last, 0))
    again = sequence_flops(config, 4, "end-to-end", "step")
    assert again.recomputed == pytest.approx(2 * inner + 4 * (2 * 32 + mlp))
    assert again.total == pytest.approx(sum(again)) == again.model + again.recomputed
    assert reading_flops(config, 4) == 2 * attention + mlp + 2 * (2 * mlp + head) + mlp - mlp * 2 / 3
    parameters = 5 * 2 + 2 * (4 * 4 + 2 * 2 + 2 * 2) + 3 * (3 * 6 + 2 * 2) + 2
    assert config.num_parameters == parameters
    assert decoding_bytes(config, 4, 2) == 2 * (parameters + 2 * 2 * (2 + 2))
    assert decoding_bytes(config, 1, 2) == 2 * (parameters + 2 * 2 * (1 + 1))


@pytest.mark.parametrize(
    ("context", "training", "reading"), [(8192, 1.41, 1.67), (32768, 0.99, 1.15), (131072, 0.40, 0.46)]
)
def test_flops_are_those_of_the_design(context: int, training: float, reading: float) -> None:
    """What TTT-E2E costs beside full attention at 3B, as it was counted before there was any code: every product above
    the lowest fast MLP six times, those of fast weights too."""
    e2e, full = recipe("3b").model, recipe("3b", "full").model
    assert training_flops(e2e, context, "end-to-end") / training_flops(full, context, "static") == pytest.approx(
        training, abs=0.06
    )
    assert reading_flops(e2e, context) / reading_flops(full, context, scored=False) == pytest.approx(reading, abs=0.04)


@pytest.fixture
def plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that computes no logits twice."""
    monkeypatch.setattr(transformer, "cross_entropy", reference_cross_entropy)


def products(config: ModelConfig, T: int, loss: str, trained: int | None = None, **options: Any) -> Counter[str]:
    """That run in one training step on a sequence of T tokens, on the way of a GPU."""
    torch.manual_seed(0)
    model, ids = Transformer(config), torch.randint(48, (1, T + 1))
    freeze_below(model, trained)
    batch = ids[:, :-1], ids[:, 1:], torch.ones(1, T, dtype=torch.bool)
    with Products(kernels=True) as counted:
        if loss == "static":
            static_loss(model, *batch, recompute=options.get("recompute", "none")).loss.backward()
        else:
            end_to_end_loss(
                model, *batch, inner_lr=1.0, inner_clip=1.0, **{"recompute": "none"} | options
            ).loss.backward()
    return counted.flops


KINDS = {
    "static": ("static", {}, ["none", "2-blocks", "blocks"]),
    "exact": ("end-to-end", {}, ["none", "1-blocks", "blocks", "sqrt", "step", "all"]),
    "first-order": ("end-to-end", {"meta_gradient": "first-order"}, ["none"]),
    "truncated": ("end-to-end", {"truncate_after": 2}, ["1-steps", "sqrt"]),
}
"""Loss, options, and schedules that are not slow."""


SHAPES: list[tuple[dict[str, Any], int | None]] = [
    ({"num_suffix_blocks": 0}, None),
    ({"num_suffix_blocks": 0, "attention": "full", "kv_heads": 1}, 2),
    ({"num_suffix_blocks": 3}, None),
    ({"num_suffix_blocks": 2, "window_size": 24, "kv_heads": 1}, 2),
    ({"num_suffix_blocks": 1, "window_size": 128}, 3),
]
"""Fields of the model, and how many blocks are trained."""


@pytest.mark.usefixtures("plain_loss")
@pytest.mark.parametrize(
    ("loss", "options", "recompute"),
    [
        pytest.param(
            loss, options, schedule, id=f"{name}-{schedule}", marks=() if schedule in essential else pytest.mark.slow
        )
        for name, (loss, options, essential) in KINDS.items()
        for schedule in dict.fromkeys((*essential, "none", "blocks", "sqrt", "step", "all"))
    ],
)
def test_flops_of_training_are_those_that_run(loss: Any, options: Any, recompute: Any) -> None:
    """Five mini-batches, of which "sqrt" keeps three."""
    for fields, trained in SHAPES:
        if loss == "end-to-end" and not fields["num_suffix_blocks"]:
            continue
        config = dataclasses.replace(SMALL, **fields)
        found = products(config, 80, loss, trained, recompute=recompute, **options)
        expected = sequence_flops(config, 80, loss, recompute, trained_blocks=trained, **options).total
        assert found["products"] == pytest.approx(expected, rel=1e-9), (fields, trained)


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x: x[0] @ x[0],
        lambda x: x @ x[0],
        lambda x: torch.addbmm(x, x[None], x[None]),
        lambda x: torch.nn.functional.conv1d(x[None], x[None]),
        lambda x: torch.ops.longread.attention(*[x[None, None]] * 5, 4, 1.0, None, None),
    ],
    ids=["dot", "mv", "addbmm", "convolution", "kernel"],
)
def test_no_product_counts_for_nothing(multiply: Callable[[Tensor], Any]) -> None:
    importlib.import_module("longread.ops.attention.triton")
    with Products(), pytest.raises(AssertionError, match="is not counted"):
        multiply(torch.ones(4, 4))


@pytest.mark.usefixtures("plain_loss")
@pytest.mark.parametrize("suffix", [0, 1, 3])
def test_flops_of_reading_are_those_that_run(suffix: int) -> None:
    """A step fires with the first token of the next mini-batch. That one has no target yet, and so no logits."""
    config = dataclasses.replace(SMALL, num_suffix_blocks=suffix)
    model, ids = Transformer(config).requires_grad_(False), torch.randint(48, (1, 65))
    with Products(kernels=True) as counted:
        read(model, begin(model), ids, inner=InnerConfig())
    unscored = 4 * (8192 + 4 * 32 * 64) + (4 + suffix) * 12288
    assert counted.flops["products"] == pytest.approx(64 * reading_flops(config, 64) + unscored, rel=1e-9)
