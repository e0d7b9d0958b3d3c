"""`longread convert` from GGUF: every architecture, its layout and metadata, quantised or not, and its tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gguf_files import byte_tokens, write
from tests.pretrained_models import GEMMA, LINEAR, TOKENS, YARN, a_text, check_equal, converted, logits_of, make, wanted
from tests.test_cli import fails

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
TOKENS_OF_BYTES: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*byte_tokens(), "ab", "<|end|>"],
    "tokenizer.ggml.token_type": [1] * 257 + [3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 257,
}
MORE = [*byte_tokens(), "ab", *"αβγδ"]
SIZES = {"vocab_size": 260, "intermediate_size": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "smollm3": ("smollm3", {}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA | {"query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA | {"query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_the_logits_of_the_model(variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    source = make(kind, **SIZES | changes)
    write(source, tmp_path / "model.gguf", TOKENS_OF_BYTES)
    opened = converted(tmp_path / "model.gguf", tmp_path / "reader", "--window", str(TOKENS))
    ids = a_text()
    check_equal(logits_of(opened, ids), wanted(source, ids))
    check_equal(logits_of(opened, ids, learning=True), wanted(source, ids))


@pytest.mark.parametrize(("kind", "quantised"), [("llama", "Q8_0"), ("llama", "Q4_0"), ("qwen3", "Q5_1")])
def test_quantised_weights_are_dequantised_and_it_is_said(
    kind: str, quantised: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(kind, **SIZES, head_dim=32)
    read = write(source, tmp_path / "model.gguf", TOKENS_OF_BYTES | {"general.license": "mit"}, kind=quantised)
    dequantised = copy.deepcopy(source)
    dequantised.load_state_dict(read)
    opened = converted(tmp_path / "model.gguf", tmp_path / "reader")
    ids = a_text()
    check_equal(logits_of(opened, ids), wanted(dequantised, ids))
    assert (wanted(dequantised, ids) - wanted(source, ids)).abs().max() > 1e-3
    assert f"in float32, dequantised from {quantised}, " in capsys.readouterr().out
    card = (tmp_path / "reader" / "README.md").read_text()
    assert f"were quantised ({quantised})" in card
    assert 'license: "mit"' in card
    assert opened.provenance["quantisation"] == quantised


def test_transformers_reads_the_same_from_a_gguf(tmp_path: Path) -> None:
    write(make("llama", **SIZES), tmp_path / "model.gguf", TOKENS_OF_BYTES, kind="Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = a_text()
    opened = converted(tmp_path / "model.gguf", tmp_path / "reader")
    check_equal(logits_of(opened, ids), wanted(theirs.eval(), ids))
    directory = tmp_path / "only"
    directory.mkdir()
    (tmp_path / "model.gguf").rename(directory / "model.gguf")
    assert converted(directory, tmp_path / "other").fingerprint == opened.fingerprint


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    source = make("llama", **SIZES)
    source.load_state_dict({name: tensor.half() for name, tensor in source.state_dict().items()})
    write(source, tmp_path / "model.gguf", TOKENS_OF_BYTES, kind="F16")
    opened = converted(tmp_path / "model.gguf", tmp_path / "reader")
    ids = a_text()
    assert opened.provenance.get("quantisation") is None
    assert (tmp_path / "reader" / "model.safetensors").stat().st_size < 3 * opened.model.config.num_parameters
    check_equal(logits_of(opened, ids), wanted(source, ids))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "phi3"}, "has the architecture 'phi3'; longread converts GGUF of llama, smollm3,"),
        ({"split.count": 2}, "is one of 2 parts; join them first with `llama-gguf-split --merge`"),
        (
            {"llama.rope.scaling.type": "longrope"},
            "has rotary scaling 'longrope'; Longread has linear,",
        ),
        ({"llama.rope.dimension_count": 4}, "turns 0.5 of each head"),
        ({"llama.block_count": 5}, "lacks the weight blk.4."),
        ({"llama.block_count": 3}, "holds the weight blk.3."),
        ({"llama.feed_forward_length": 32}, "blk.0.ffn_gate.weight has shape (64, 32), but its config asks for (32,"),
        ({"llama.attention.head_count_kv": [2, 2, 1, 2]}, "has num_key_value_heads that differs from block to block"),
        ({"tokenizer.ggml.pre": "poro"}, "splits texts by the rule 'poro'; known are gpt-2, smollm,"),
        ({"tokenizer.ggml.model": "bert"}, "has a tokenizer of kind 'bert'"),
        ({"tokenizer.ggml.tokens": MORE}, "the tokenizer has 261 tokens and model.gguf knows 260"),
        ({"tokenizer.ggml.merges": ["a x"]}, "the tokenizer in "),
    ],
)
def test_what_cannot_be_read(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(make("llama", **SIZES), tmp_path / "model.gguf", TOKENS_OF_BYTES | changes)
    assert said in fails(capsys, "convert", tmp_path / "model.gguf", tmp_path / "reader")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_a_file_that_is_no_whole_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    write(make("llama", **SIZES), path, TOKENS_OF_BYTES)
    cut, reader = tmp_path / "cut.gguf", tmp_path / "reader"
    for size in (3, 2000, path.stat().st_size - 4096):
        cut.write_bytes(path.read_bytes()[:size])
        assert "cut.gguf is no whole GGUF file: " in fails(capsys, "convert", cut, reader)
    path.rename(tmp_path / "other.gguf")
    assert "holds several GGUF files (cut.gguf, other.gguf); give the path of one" in fails(
        capsys, "convert", tmp_path, tmp_path / "reader"
    )
