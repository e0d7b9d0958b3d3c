"""`longread convert READER OUT --to transformers`: a plain windowed model that computes what the reader does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from longread.checkpoint import load_model, save_model
from longread.loading import OpenModel, open_model
from tests import tiny
from tests.pretrained_models import GEMMA, TOKENS, VARIANTS, a_text, check_equal, convert, logits_of, make, save, wanted
from tests.test_cli import fails


def there_and_back(kind: str, changes: dict, home: Path, *options: str) -> tuple[PreTrainedModel, OpenModel, Path]:
    """The source, the reader, and where the plain model is."""
    source = make(kind, **changes)
    assert convert(save(source, home / "source"), home / "reader", *options) == 0
    assert convert(home / "reader", home / "plain", "--to", "transformers") == 0
    return source, open_model(home / "reader", "cpu"), home / "plain"


def plain_model(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_windowed_model(variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    window = TOKENS if kind == "gemma3_text" else 8  # whose blocks with global angles have no windows in Transformers
    source, reader, directory = there_and_back(kind, changes, tmp_path, "--window", str(window))
    ids = a_text()
    plain = plain_model(directory)
    check_equal(wanted(plain, ids), logits_of(reader, ids))
    if "yarn" not in variant and "gemma" not in kind:  # whose factors stay in the weights
        theirs = source.state_dict()
        for name, tensor in plain.state_dict().items():
            assert torch.allclose(tensor, theirs[name].reshape(tensor.shape), atol=1e-6, rtol=0), name
    assert PreTrainedTokenizerFast.from_pretrained(directory).encode("a b") == reader.tokenizer.encode("a b")


def test_gemma_says_which_windows_it_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there_and_back("gemma3_text", GEMMA | {"sliding_window": 8}, tmp_path, "--window", "16")
    assert (
        "1 blocks see everything, since gemma3_text has windows only where angles are local" in capsys.readouterr().out
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_fast_mlp_in_place_is_the_mlp(kind: str, tmp_path: Path) -> None:
    changes = GEMMA if kind == "gemma3_text" else {}
    source, reader, directory = there_and_back(kind, changes, tmp_path, "--scheme", "in-place", "--suffix", "2")
    assert reader.model.blocks[-1].fast_mlp.down.weight.any()
    ids = a_text()
    check_equal(wanted(plain_model(directory), ids), wanted(source, ids))


def test_what_has_learned_is_left_out_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _, _ = there_and_back("llama", {}, tmp_path, "--suffix", "2")
    loaded = load_model(tmp_path / "reader")
    with torch.no_grad():
        loaded.model.blocks[-1].fast_mlp.down.weight.normal_(std=0.1)
    save_model(tmp_path / "adapted", loaded.model, loaded.inner, None)
    said = fails(capsys, "convert", tmp_path / "adapted", tmp_path / "other", "--to", "transformers")
    assert f"1 fast MLPs of {tmp_path / 'adapted'} have learned something" in said
    assert "give --drop-fast to leave them out" in said
    assert not (tmp_path / "other").exists()
    assert convert(tmp_path / "adapted", tmp_path / "other", "--to", "transformers", "--drop-fast") == 0
    ids = a_text()
    check_equal(wanted(plain_model(tmp_path / "other"), ids), wanted(source, ids))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_was_never_pretrained_elsewhere(tied: bool, tmp_path: Path) -> None:
    """Sandwich norms and normed queries are Gemma 3's, whose scale of the embedding is made up for."""
    model = tiny.make(num_suffix_blocks=0, tie_embeddings=tied)
    with torch.no_grad():
        model.head_weight.mul_(100)
    save_model(tmp_path / "mine", model, tiny.INNER, None)
    assert convert(tmp_path / "mine", tmp_path / "plain", "--to", "transformers") == 0
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "gemma3_text"
    ids = torch.randint(0, model.config.vocab_size, (1, 3 * model.config.window_size))
    with torch.no_grad():
        lower, upper = model.empty_pasts(1)
        hidden, _ = model.lower(ids, lower, start=0)
        want = model.logits(model.upper(hidden, None, upper, start=0, order=0)[0])
    check_equal(wanted(plain_model(tmp_path / "plain"), ids), want.float())


def test_half_precision_there_and_back(tmp_path: Path) -> None:
    source = make("gemma3_text", **GEMMA | {"query_pre_attn_scalar": 16}).to(torch.bfloat16)
    assert convert(save(source, tmp_path / "source"), tmp_path / "reader") == 0
    assert convert(tmp_path / "reader", tmp_path / "plain", "--to", "transformers") == 0
    plain = plain_model(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16
    theirs = source.state_dict()
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixer": "mamba2", "num_suffix_blocks": 0}, "the model has mixer mamba2"),
        ({"pre_norm": False, "num_suffix_blocks": 0}, "the model has no norms before its sub-layers"),
        ({"qkv_bias": True, "num_suffix_blocks": 0}, "biases of queries, keys and values"),
        ({"block_windows": (3, 5, 0, 0), "num_blocks": 4, "num_suffix_blocks": 0}, "the model has windows of [3, 5, "),
    ],
)
def test_what_transformers_lacks(changes: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "mine", tiny.make(**changes), tiny.INNER, None)
    assert said in fails(capsys, "convert", tmp_path / "mine", tmp_path / "plain", "--to", "transformers")
    assert not (tmp_path / "plain").exists()
