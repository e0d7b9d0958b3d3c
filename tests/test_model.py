"""The network against its definition: names, counts, masks, positions, initial weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import ttt_e2e_minimal as minimal
from longread.config import ModelConfig, OptimizerConfig
from longread.model import Transformer, free_bytes, initialize, undrawn
from longread.model.layers import Linear
from longread.ops.rotary import frequencies, rotate, rotation
from longread.outer_loop import end_to_end_loss, static_loss
from longread.train.optimizer import make_optimizer


def config(**changes: object) -> ModelConfig:
    fields = {
        "vocab_size": 23,
        "width": 16,
        "num_blocks": 6,
        "num_heads": 2,
        "mlp_hidden": 24,
        "window_size": 5,
        "mini_batch_size": 4,
        "num_suffix_blocks": 2,
    }
    return ModelConfig(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_suffix_blocks": 0},
        {"tie_embeddings": False},
        {"qk_norm": False},
        {"pre_norm": False},
        {"post_norm": False},
        {"num_heads": 4, "kv_heads": 2, "head_size": 6, "qkv_bias": True},
        {"fast_hidden": 10, "fast_pre_norm": False, "fast_post_norm": True},
        {"post_norm": False, "fast_post_norm": True},
    ],
    ids=str,
)
def test_parameter_names_and_count(changes: dict) -> None:
    c = config(**changes)
    model = Transformer(c)
    names = {name for name, _ in model.named_parameters()}
    expected = {"embedding.weight", "final_norm.weight"} | (set() if c.tie_embeddings else {"head.weight"})
    for i in range(c.num_blocks):
        layers = {"attention": ["query", "key", "value", "output"], "static_mlp": ["gate", "up", "down"]}
        if i >= c.num_prefix_blocks:
            layers["fast_mlp"] = ["gate", "up", "down"]
        for layer, matrices in layers.items():
            before, after = c.fast_norms if layer == "fast_mlp" else (c.pre_norm, c.post_norm)
            norms = ["pre_norm"] * before + ["post_norm"] * after
            if layer == "attention":
                norms += ["query_norm", "key_norm"] * c.qk_norm
                expected |= {f"blocks.{i}.attention.{name}.bias" for name in matrices[:3] * c.qkv_bias}
            expected |= {f"blocks.{i}.{layer}.{name}.weight" for name in matrices + norms}
    assert names == expected
    assert c.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    fast = model.initial_fast_weights(1)
    assert c.num_fast_weights == sum(w.numel() for block in fast for w in block)


@pytest.mark.parametrize("attention", ["window", "full", "hybrid"])
def test_the_network_is_that_of_the_design(attention: str) -> None:
    model = Transformer(config(attention=attention)).double()
    tokens = torch.randint(23, (2, 21))
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    mask = torch.ones_like(ids, dtype=torch.bool)
    p = dict(model.named_parameters())
    losses, _ = minimal.end_to_end_losses(p, model.config, ids, targets, mask, lr=0.0, clip=None)
    found = static_loss(model, ids, targets, mask)
    torch.testing.assert_close(found.mini_batch_loss, losses.detach(), rtol=1e-10, atol=1e-12)


def test_logits_and_token_losses_are_one() -> None:
    model = Transformer(config())
    output, targets = torch.randn(2, 3, 16), torch.randint(23, (2, 3))
    expected = torch.nn.functional.cross_entropy(
        model.logits(output).flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(model.token_losses(output, targets).flatten(), expected)


def test_rotation_is_relative_at_any_position() -> None:
    """Scores depend on the distance alone, also after ten million tokens in float32."""
    q, k = torch.randn(1, 64), torch.randn(1, 64)
    for distance in (0, 1, 100):
        scores = []
        for start in (0, 1000, 10_000_000):
            rotary = rotation(start, distance + 1, frequencies(64, 5e5), q)
            scores.append((rotate(q, rotary[distance:]) * rotate(k, rotary[:1])).sum())
        torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-4)


def test_initial_weights_follow_the_width() -> None:
    model = Transformer(config(width=256, mlp_hidden=512, vocab_size=4000))
    initialize(model, seed=0)
    p = dict(model.named_parameters())
    assert p["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert p["blocks.0.attention.query.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert p["blocks.5.fast_mlp.down.weight"].std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert torch.equal(p["final_norm.weight"], torch.ones(256))
    fixed = Transformer(config(width=256, init_std=0.05))
    assert fixed.blocks[0].attention.query.weight.std().item() == pytest.approx(0.05, rel=0.02)


def test_a_seed_draws_the_same_weights() -> None:
    models = [Transformer(config()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialize(model, seed=seed)
    flat = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_products_run_in_the_compute_type() -> None:
    model = Transformer(config())
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(23, (2, 13))
    mask = torch.ones(2, 12, dtype=torch.bool)
    loss = static_loss(model, tokens[:, :-1], tokens[:, 1:], mask)
    assert loss.nll.dtype == torch.float32
    loss.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    model.compute_dtype = None
    wide = static_loss(model, tokens[:, :-1], tokens[:, 1:], mask)
    torch.testing.assert_close(loss.nll, wide.nll, rtol=0.05, atol=0.1)
    assert not torch.equal(loss.nll, wide.nll)


def test_free_memory_is_what_the_system_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longread.model.device.MEMORY_INFO", info := tmp_path / "meminfo")
    monkeypatch.setattr("longread.model.device.CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.__getitem__)
    assert free_bytes(torch.device("cpu")) == 2**31  # neither: macOS
    info.write_text("MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  5000 kB\n")
    assert free_bytes(torch.device("cpu")) == 5000 * 1024
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 700000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    assert free_bytes(torch.device("cpu")) == 1_700_000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()  # version 1
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("3000000\n")
    (tmp_path / "memory" / "memory.stat").write_text("cache 900000\ntotal_inactive_file 600000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert free_bytes(torch.device("cpu")) == 5000 * 1024
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4000000\n")
    assert free_bytes(torch.device("cpu")) == 1_600_000


def test_a_linear_layer_with_a_bias() -> None:
    layer = Linear(3, 5, bias=True)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (5, 3), "bias": (5,)}
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.nn.functional.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))
    assert repr(layer) == "Linear(3 → 5, with bias)"
    assert repr(Linear(3, 5)) == "Linear(3 → 5)"
    assert [name for name, _ in Linear(3, 5).named_parameters()] == ["weight"]


def with_biases(**changes: Any) -> Transformer:
    """A network whose queries have biases, wherever a configuration would put them."""
    model = Transformer(config(**changes))
    for block in model.blocks:
        width = model.config.width
        block.attention.query = Linear(width, width, bias=True)
    return model


def test_biases_begin_at_zero_and_do_not_decay() -> None:
    model = with_biases()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.fill_(3.0)
    initialize(model, seed=0)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    assert len(biases) == len(model.blocks)
    assert not any(p.any() for p in biases.values())
    decayed, exempt = make_optimizer(model, OptimizerConfig(lr=1.0)).param_groups
    assert exempt["weight_decay"] == 0
    assert {id(p) for p in biases.values()} <= {id(p) for p in exempt["params"]}
    assert not {id(p) for p in biases.values()} & {id(p) for p in decayed["params"]}


def test_the_outer_gradient_of_biases_is_their_slope() -> None:
    """Through inner steps, where their casts are shared; the highest block's bias is used at every step."""
    model = with_biases().double()
    initialize(model, seed=0)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    tokens = torch.randint(23, (2, 13), generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        mask = torch.ones(2, 12, dtype=torch.bool)
        return end_to_end_loss(model, tokens[:, :-1], tokens[:, 1:], mask, inner_lr=0.5, inner_clip=None).loss

    loss().backward()
    for i, bias in enumerate(biases):
        way = torch.randn(len(bias), generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        losses = []
        for distance in (1e-5, -1e-5):
            with torch.no_grad():
                bias.copy_(distance * way)
            losses.append(loss().item())
        bias.data.zero_()
        assert (bias.grad @ way).item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True, "tie_embeddings": False}, {"mixer": "mamba2", "num_suffix_blocks": 0}], ids=str
)
def test_a_network_that_is_not_drawn(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(**changes)
    if c.mixer == "attention":
        monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # seconds, for nothing
    empty = undrawn(c)
    monkeypatch.undo()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    drawn = Transformer(c).state_dict()
    assert {name: p.shape for name, p in empty.state_dict().items()} == {name: p.shape for name, p in drawn.items()}
    assert list(empty.state_dict()) == list(drawn)
