"""A converted model computes what the pretrained one does: every family, every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from longread.checkpoint import fingerprint_of, load_model
from tests.pretrained_models import (
    GEMMA,
    TOKENS,
    VARIANTS,
    a_text,
    check_equal,
    converted,
    logits_of,
    losses_of,
    make,
    save,
    wanted,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_the_same_logits(variant: str, tmp_path: Path) -> None:
    """With a window as long as the text: frozen, and through fast weights of its own, as a first mini-batch is read."""
    kind, changes = VARIANTS[variant]
    source = make(kind, **changes)
    window = str(8 if variant == "mistral, windows" else TOKENS)
    opened = converted(save(source, tmp_path / "source"), tmp_path / "reader", "--window", window)
    ids = a_text()
    want = wanted(source, ids)
    check_equal(logits_of(opened, ids), want)
    check_equal(logits_of(opened, ids, learning=True), want)


@pytest.mark.parametrize("scheme", ["zero-copy", "in-place"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_schemes_say_where_the_fast_mlps_come_from(kind: str, scheme: str, tmp_path: Path) -> None:
    """All blocks can learn, from mini-batches of 16; the first is read as the pretrained model reads it."""
    source = make(kind, **(GEMMA if kind != "llama" else {}))
    options = ("--scheme", scheme, "--suffix", str(source.config.num_hidden_layers), "--mini-batch", "16")
    opened = converted(save(source, tmp_path / "source"), tmp_path / "reader", *options)
    ids = a_text()
    want = wanted(source, ids)
    check_equal(logits_of(opened, ids, learning=True), want)
    nll = functional.cross_entropy(want[0, :-1], ids[0, 1:], reduction="none")
    frozen, learning = (losses_of(opened, ids, learn=learn) for learn in (False, True))
    assert (frozen - nll).abs().max() < 1e-4
    assert (learning[:16] - nll[:16]).abs().max() < 1e-4
    assert (learning[16:] - nll[16:]).abs().min() > 0, "it has not learned"


def test_some_units_of_a_fast_mlp(tmp_path: Path) -> None:
    source = make("qwen3", head_dim=8)
    opened = converted(save(source, tmp_path / "source"), tmp_path / "reader", "--fast-hidden", "10")
    ids = a_text()
    check_equal(logits_of(opened, ids, learning=True), wanted(source, ids))
    mlp, fast = source.model.layers[-1].mlp, opened.model.blocks[-1].fast_mlp
    weight = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    units = [i for i in range(48) if (weight > weight[i]).sum() < 10]
    assert len(units) == 10
    assert torch.equal(fast.gate.weight, mlp.gate_proj.weight[units])
    assert torch.equal(fast.up.weight, mlp.up_proj.weight[units])
    assert not fast.down.weight.any()
    assert fast.down.weight.shape == (32, 10)


def test_a_small_window_is_that_of_mistral(tmp_path: Path) -> None:
    plain = make("llama")
    windowed = make("mistral", sliding_window=8)
    windowed.load_state_dict(plain.state_dict())
    opened = converted(save(plain, tmp_path / "source"), tmp_path / "reader", "--window", "8", "--mini-batch", "4")
    ids = a_text()
    check_equal(logits_of(opened, ids), wanted(windowed, ids))
    assert (logits_of(opened, ids) - wanted(plain, ids)).abs().max() > 1e-2


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    source = make("qwen2")
    whole = converted(save(source, tmp_path / "whole"), tmp_path / "one")
    directory = save(source, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    assert converted(directory, tmp_path / "other").fingerprint == whole.fingerprint == fingerprint_of(whole.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices are as they were; gains, 1 + w here, are not rounded to it."""
    directory = save(make("gemma3_text", **GEMMA).to(dtype), tmp_path / "source")
    opened = converted(directory, tmp_path / "reader")
    stored = load_file(tmp_path / "reader" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.dim() == 2} == {dtype}
    assert {t.dtype for t in stored.values() if t.dim() == 1} == {torch.float32}
    on_a_gpu = load_model(tmp_path / "reader", dtype=torch.bfloat16).model
    assert on_a_gpu.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in on_a_gpu.parameters()} == {torch.bfloat16, torch.float32}
    ids, source = a_text(), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    check_equal(logits_of(opened, ids), wanted(source, ids))


def test_another_type_if_it_is_asked_for(tmp_path: Path) -> None:
    source = save(make("qwen3", head_dim=8), tmp_path / "source")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        opened = converted(source, tmp_path / name, "--dtype", name)
        stored = load_model(tmp_path / name).model
        assert stored.dtype == dtype
        assert stored.final_norm.weight.dtype == torch.float32
        assert opened.model.dtype == torch.float32
    whole = load_model(tmp_path / "float32").model.embedding.weight
    assert torch.equal(load_model(tmp_path / "bfloat16").model.embedding.weight, whole.to(torch.bfloat16))
    assert (load_model(tmp_path / "float32", dtype=torch.bfloat16).model.final_norm.weight).dtype == torch.bfloat16
