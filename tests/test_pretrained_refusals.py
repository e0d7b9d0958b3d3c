"""What cannot be converted: one sentence each, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longread.cli import main
from tests.pretrained_models import YARN, convert, make, save, tokenizer
from tests.test_cli import fails


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("llama"), tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "source")
    return tmp_path / "source"


def refused(source: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The sentence; nothing is left beside the source."""
    before = sorted(source.parent.iterdir())
    said = fails(capsys, "convert", source, source.parent / "reader", *options)
    assert sorted(source.parent.iterdir()) == before
    return said.replace(str(source), "SOURCE")


def change(source: Path, **values: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "has the architecture 'mixtral'; longread converts llama, mistral, smollm3, qwen2,"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised (gptq), which is not read; give the"),
    ({"mlp_bias": True}, "has biases in its MLPs (mlp_bias), which Longread's network lacks"),
    ({"hidden_act": "relu"}, "has the activation 'relu'; Longread's MLPs have silu, swish, gelu_pytorch_tanh,"),
    ({"head_dim": 7}, "model.head_size is 7; it must be even"),
    ({"num_hidden_layers": None}, "says num_hidden_layers None; it must be a whole number of at least 1"),
    ({"num_key_value_heads": 3}, "model.kv_heads is 3; it must divide model.num_heads, 4"),
    ({"partial_rotary_factor": 0.5}, "turns 0.5 of each head (partial_rotary_factor), and Longread turns whole heads"),
    ({"rope_parameters": YARN | {"rope_type": "dynamic"}}, "has rotary scaling 'dynamic'; Longread has linear, llama3"),
    ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "has rotary scaling 'longrope'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "the rotary scaling of SOURCE/config.json cannot be"),
    ({"num_hidden_layers": 5}, "lacks the weight model.layers.4.input_layernorm.weight; fetch it again"),
    ({"num_hidden_layers": 3}, "holds the weight model.layers.3."),
    ({"intermediate_size": 50}, "mlp.gate_proj.weight has shape (48, 32), but its config asks for (50, 32)"),
    ({"vocab_size": 97}, "embed_tokens.weight has shape (96, 32), but its config asks for (97, 32); fetch both"),
    ({"model_type": "qwen2"}, "lacks the weight model.layers.0.self_attn.q_proj.bias"),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"] * 2},
        "has layer_types ['chunked_attention', 'full_attention'] for 4 of 4 blocks",
    ),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "has attention in both directions"),
]


@pytest.mark.parametrize(("values", "said"), CONFIGS)
def test_configs(values: dict[str, Any], said: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(source, **values)
    assert said in refused(source, capsys)


def test_a_bias_behind_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make("llama", attention_bias=True)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.bias[5] = 0.1
    source = save(model, tmp_path / "source")
    assert "holds the weight model.layers.2.self_attn.o_proj.bias, which a llama model" in refused(source, capsys)


def test_weights_that_are_missing_or_too_many(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source / "model.safetensors"
    whole = load_file(path)
    less = {name: tensor for name, tensor in whole.items() if "layers.1.mlp.up" not in name}
    save_file(less, path)
    assert "lacks the weight model.layers.1.mlp.up_proj.weight" in refused(source, capsys)
    save_file(whole | {"model.layers.1.mlp.experts.0.weight": torch.zeros(2)}, path)
    assert "holds the weight model.layers.1.mlp.experts.0.weight" in refused(source, capsys)
    save_file(whole | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, path)
    assert convert(source, source.parent / "reader") == 0


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make("llama"), tmp_path / "source", max_shard_size="40KB")
    shards = sorted(source.glob("model-*.safetensors"))
    data = shards[1].read_bytes()
    shards[1].unlink()
    said = refused(source, capsys)
    assert f"SOURCE lacks {shards[1].name}, one of {len(shards)} shards that model.safetensors.index.json names" in said
    shards[1].write_bytes(data[:-100])
    assert f"SOURCE/{shards[1].name} cannot be read: " in refused(source, capsys)
    (source / "model.safetensors.index.json").write_text("{}")
    assert "is no index of shards" in refused(source, capsys)


def test_pickles_and_no_weights(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "holds its weights as pickles (pytorch_model.bin), which can run code and are never loaded" in refused(
        source, capsys
    )
    (source / "pytorch_model.bin").unlink()
    assert "SOURCE holds no model.safetensors and no model.safetensors.index.json" in refused(source, capsys)


def test_tokenizers(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer(97).save(str(source / "tokenizer.json"))
    assert "the tokenizer has 97 tokens and source knows 96; give the model's own with --tokenizer" in refused(
        source, capsys
    )
    (source / "tokenizer.json").unlink()
    assert "SOURCE has no tokenizer.json; save one there with Transformers" in refused(source, capsys)
    other = source.parent / "other"
    other.mkdir()
    tokenizer(90).save(str(other / "tokenizer.json"))
    assert convert(source, source.parent / "reader", "--tokenizer", str(other)) == 0


DIALS: list[tuple[list[str], str]] = [
    (["--window", "513"], "--window 513 is more than source was made for, which has 512 tokens of context; lower it"),
    (["--suffix", "5"], "--suffix 5 is more than the 4 blocks of the model"),
    (["--suffix", "-1"], "model.num_suffix_blocks is -1; it must be at least 0"),
    (["--fast-hidden", "49"], "--fast-hidden 49 is more than the 48 units of the model's MLPs"),
    (["--fast-hidden", "8", "--scheme", "in-place"], "--fast-hidden 8 would split the 48 units of an MLP over two"),
    (["--to", "transformers"], "SOURCE is a Transformers model or a GGUF already; leave out --to transformers"),
    (["--drop-fast"], "--drop-fast belongs to --to transformers; leave it out"),
    (["--tokenizer", "nowhere"], "nowhere has no tokenizer.json"),
]


@pytest.mark.parametrize(("options", "said"), DIALS)
def test_dials(options: list[str], said: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(source, capsys, *options)


def test_a_window_beyond_all_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make("mistral", sliding_window=16), tmp_path / "source")
    said = refused(source, capsys, "--window", "17")
    assert "--window 17 is more than source was made for, which has windows of 16 tokens" in said
    assert convert(source, tmp_path / "reader") == 0
    assert json.loads((tmp_path / "reader" / "config.json").read_text())["model"]["window_size"] == 16


def test_places(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "taken").mkdir()
    (source.parent / "taken" / "file").touch()
    assert "already exists; give the name of a new directory" in fails(
        capsys, "convert", source, source.parent / "taken"
    )
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = refused(source, capsys)
    assert "the converted model has 0.00 GiB and " in said
    assert "0.00 GiB free; free some space or choose another place" in said


def test_out_of_memory(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("longread.pretrained.safetensors_source.SafetensorsSource.read", full)
    assert "out of memory: " in refused(source, capsys)


def test_options_of_other_conversions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = fails(capsys, "convert", "longread-small", tmp_path / "out", "--window", "8")
    assert "--window is about a pretrained model, and longread-small is none; leave it out" in said


def cached(llama: Path, hub: Path, *revisions: str, named: str | None = None) -> None:
    """Puts the model into a cache as huggingface_hub lays it out."""
    folder = hub / "models--someone--tiny"
    for revision in revisions:
        shutil.copytree(llama, folder / "snapshots" / revision)
    if named:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(named)


def test_names_of_the_hub(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    said = fails(capsys, "convert", "someone/tiny", tmp_path / "reader")
    assert "someone/tiny is no directory here and not in the cache of the Hugging Face Hub" in said
    assert "fetch it first with `hf download someone/tiny`" in said
    cached(llama, tmp_path / "hub", "abc123", "def456", named="def456")
    (tmp_path / "hub/models--someone--tiny/snapshots/def456/README.md").write_text("---\nlicense: apache-2.0\n---\n# T")
    (tmp_path / "hub/models--someone--tiny/snapshots/def456/LICENSE").write_text("free")
    assert main(["convert", "someone/tiny", str(tmp_path / "reader")]) == 0
    card = (tmp_path / "reader" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: longread\nlicense: "apache-2.0"\nbase_model: someone/tiny\n---\n')
    assert "`someone/tiny` (revision def456), a pretrained llama model with 512 tokens of context" in card
    assert (tmp_path / "reader" / "LICENSE").read_text() == "free"
    provenance = json.loads((tmp_path / "reader" / "config.json").read_text())["provenance"]
    expected = {"converted_from": "someone/tiny", "revision": "def456", "license": "apache-2.0", "context": 512}
    assert expected.items() <= provenance.items()
    shutil.rmtree(tmp_path / "hub/models--someone--tiny/refs")
    shutil.rmtree(tmp_path / "hub/models--someone--tiny/snapshots/def456")
    assert main(["convert", "someone/tiny", str(tmp_path / "other")]) == 0


def test_a_model_that_sees_is_converted_without_its_eyes(tmp_path: Path) -> None:
    """Gemma 3's larger models: the text model lies inside, and its config in a table of its own."""
    text = make("gemma3_text", head_dim=8)
    source = save(text, tmp_path / "text")
    whole = load_file(source / "model.safetensors")
    for place, (inside, eyes) in enumerate(
        [("language_model.model.", "vision_tower.x"), ("model.language_model.", "model.multi_modal_projector.x")]
    ):
        seeing = tmp_path / f"seeing{place}"
        shutil.copytree(source, seeing)
        named = {name.replace("model.", inside, 1): tensor for name, tensor in whole.items()}
        named = {("language_" if "lm_head" in n and not place else "") + n: t for n, t in named.items()}
        named = {n.replace("language_lm_head", "language_model.lm_head"): t for n, t in named.items()}
        save_file(named | {eyes: torch.zeros(3)}, seeing / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        (seeing / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
        assert convert(seeing, tmp_path / f"reader{place}") == 0
    assert convert(source, tmp_path / "plain") == 0
    prints = {
        json.loads((tmp_path / name / "config.json").read_text())["fingerprint"]
        for name in ("plain", "reader0", "reader1")
    }
    assert len(prints) == 1
