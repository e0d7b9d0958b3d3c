"""Operations counted from a config: by hand, by the design, and as they run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from longread.config import InnerConfig, ModelConfig
from longread.flops import decoding_bytes, reading_flops, recomputed_flops, training_flops, visible_keys
from longread.inner_loop import begin, read
from longread.model import Transformer
from longread.outer_loop import end_to_end_loss, static_loss
from longread.recipes import recipe

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
    assert training_flops(config, 4, "end-to-end") == 3 * (2 * attention + mlp) + 6 * (2 * mlp + head)
    assert reading_flops(config, 4) == 2 * attention + mlp + 2 * (2 * mlp + head) + mlp - mlp * 2 / 3
    parameters = 5 * 2 + 2 * (4 * 4 + 2 * 2 + 2 * 2) + 3 * (3 * 6 + 2 * 2) + 2
    assert config.num_parameters == parameters
    assert decoding_bytes(config, 4, 2) == 2 * (parameters + 2 * 2 * (2 + 2))
    assert decoding_bytes(config, 1, 2) == 2 * (parameters + 2 * 2 * (1 + 1))


@pytest.mark.parametrize(
    ("context", "training", "reading"), [(8192, 1.41, 1.67), (32768, 0.99, 1.15), (131072, 0.40, 0.46)]
)
def test_flops_are_those_of_the_design(context: int, training: float, reading: float) -> None:
    """What TTT-E2E costs beside full attention at 3B, as it was once counted before there was any code."""
    e2e, full = recipe("3b").model, recipe("3b", "full").model
    assert training_flops(e2e, context, "end-to-end") / training_flops(full, context, "static") == pytest.approx(
        training, abs=0.04
    )
    assert reading_flops(e2e, context) / reading_flops(full, context, scored=False) == pytest.approx(reading, abs=0.04)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func) and func.overloadpacket in flop_registry:
            self.flops["products"] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    ("suffix", "what", "tolerance"),
    [(0, "train", 0), (1, "train", 0), (1, "end-to-end", 0.03), (0, "read", 0.01), (1, "read", 0.01)],
)
def test_flops_are_those_that_run(suffix: int, what: str, tolerance: float) -> None:
    """All but attention's, whose fused kernels count whole squares; one block above has none of its own."""
    config = ModelConfig.from_dict({**{n: getattr(SMALL, n) for n in SMALL.__slots__}, "num_suffix_blocks": suffix})
    model, T = Transformer(config), 256
    ids = torch.randint(48, (1, T + 1))
    batch = ids[:, :-1], ids[:, 1:], torch.ones(1, T, dtype=torch.bool)
    with Products() as counted:
        if what == "read":
            read(model.requires_grad_(False), begin(model), ids, inner=InnerConfig())
        elif what == "train":
            static_loss(model, *batch).loss.backward()
        else:
            end_to_end_loss(model, *batch, inner_lr=1.0, inner_clip=1.0, recompute="none").loss.backward()
    scores = 4 * 4 * config.width * visible_keys(T, 64)
    if what == "read":
        expected = reading_flops(config, T) - scores
    else:
        expected = training_flops(config, T, "static" if what == "train" else "end-to-end") - 3 * scores
    assert counted.flops["products"] / T == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("recompute", ["blocks", "sqrt", "step"])
@pytest.mark.parametrize("loss", ["end-to-end", "static"])
def test_flops_of_what_runs_again_are_those_that_run(loss: str, recompute: Any) -> None:
    """Beyond a step that keeps everything. Of 16 mini-batches the last four, or the last, do not run again."""
    T = 256
    torch.manual_seed(0)
    ids = torch.randint(48, (1, T + 1))
    batch = ids[:, :-1], ids[:, 1:], torch.ones(1, T, dtype=torch.bool)

    def products(schedule: Any) -> int:
        model = Transformer(SMALL)
        with Products() as counted:
            if loss == "static":
                static_loss(model, *batch, recompute=schedule).loss.backward()
            else:
                end_to_end_loss(model, *batch, inner_lr=1.0, inner_clip=1.0, recompute=schedule).loss.backward()
        return counted.flops["products"]

    more = (products(recompute) - products("none")) / T
    assert more == pytest.approx(recomputed_flops(SMALL, T, loss, recompute), rel=1e-9)  # type: ignore[arg-type]
    assert recomputed_flops(SMALL, T, loss, "none") == 0  # type: ignore[arg-type]
