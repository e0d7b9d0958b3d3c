"""A model that exists is trained further: as it is, as its twins, or its last blocks alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longread.checkpoint import load_model, newest_checkpoint, read_checkpoint, save_model
from longread.cli import main
from longread.config import InnerConfig, ModelConfig, RunConfig, UserError
from longread.files import read_json
from longread.inner_loop import begin, read
from longread.model import Transformer
from longread.recipes import adapt, toy
from longread.tokenizer import ByteTokenizer
from tests.test_cli import SENTENCES, fails
from tests.tiny import make

V, PADDED = 257, 264
SIZES: dict[str, Any] = {"vocab_size": PADDED, "window_size": 16, "mini_batch_size": 8, "post_norm": False}


def save(directory: Path, model: Transformer, **inner: Any) -> Path:
    """A model directory as a conversion leaves it, with what pretrained models say beside their tokenizer."""
    provenance = {"converted_from": "somebody/Small-1B", "license": "apache-2.0", "quantisation": "Q4_1"}
    save_model(directory, model, InnerConfig(**inner), ByteTokenizer.fingerprint, provenance)
    ByteTokenizer().save(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "LICENSE").write_text("Do what you like.")
    return directory


def silence(model: Transformer, part: str) -> None:
    with torch.no_grad():
        for block in model.suffix:
            getattr(block, part).down.weight.zero_()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a model whose fast MLPs add nothing yet; its vocabulary is padded."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(SENTENCES)
    model = make(**SIZES)
    silence(model, "fast_mlp")
    save(home / "converted", model)
    prepare = ["prepare", home / "text.txt", "--out", home / "data", "--tokenizer", home / "converted"]
    assert main([str(a) for a in prepare]) == 0
    return home


def command(home: Path, out: Path, *more: object, model: str = "converted") -> list[str]:
    sizes = ["--context-length", 32, "--batch-size", 2, "--device", "cpu"]
    return [str(a) for a in ["train", home / model, "--data", home / "data", "--out", out, *sizes, *more]]


def config_of(run: Path) -> RunConfig:
    return RunConfig.from_dict(read_json(run / "run.json", kind="run")["config"])


def losses(model: Transformer, *, learn: bool) -> torch.Tensor:
    tokens = torch.tensor([list(SENTENCES[:48].encode())])
    return read(model, begin(model, 1), tokens, inner=InnerConfig(), learn=learn).nll[:, 1:]


def test_the_schedule_of_an_adaptation() -> None:
    config = adapt(toy().model, context_length=1024)
    assert (config.steps, config.batch_size, config.optimizer.lr, config.optimizer.clip) == (200, 8, 3e-4, 1.0)
    assert (config.optimizer.warmup_steps, config.optimizer.decay_steps, config.inner.warmup_steps) == (20, 200, 20)
    assert [config.inner.lr_at(step) for step in (0, 19, 100)] == pytest.approx([0.145, 1.0, 1.0])
    assert config.model == toy().model
    assert config.meta_gradient == "first-order"
    assert adapt(toy().model).context_length == 8192


def test_a_model_is_adapted_and_says_from_what(home: Path, tmp_path: Path) -> None:
    assert main(command(home, tmp_path / "run", "--tokens", 192, "--window", 12, "--set", "inner.clip=0.5")) == 0
    config = config_of(tmp_path / "run")
    assert (config.steps, config.context_length, config.batch_size) == (3, 32, 2)
    assert (config.model.vocab_size, config.model.window_size, config.model.num_suffix_blocks) == (PADDED, 12, 2)
    assert (config.name, config.loss, config.inner.lr, config.inner.clip) == ("adapt-e2e", "end-to-end", 1.0, 0.5)
    loaded = load_model(tmp_path / "run")
    origin = loaded.metadata["provenance"]["adapted_from"]
    assert (origin["model"], origin["fingerprint"]) == ("converted", load_model(home / "converted").fingerprint)
    assert origin["provenance"]["license"] == "apache-2.0"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: longread\nlicense: "apache-2.0"\nbase_model: somebody/Small-1B\n---\n')
    assert "It began with `converted`" in card
    assert "dequantised (Q4_1)" in card
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"),
        *("README.md", "LICENSE"),
    }
    before, after = load_model(home / "converted").model.state_dict(), loaded.model.state_dict()
    assert all((before[name] != after[name]).any() for name in before if not name.startswith("blocks.0.fast"))


def test_a_model_that_never_learned_is_adapted_at_the_rate_of_the_method(home: Path, tmp_path: Path) -> None:
    """Whatever it says for those who let it learn all the same."""
    source = save(tmp_path / "source", make(**SIZES), lr=0.25, clip=0.5)
    data = ["--data", str(home / "data"), "--steps", "1", "--context-length", "32", "--batch-size", "1"]
    for learns, rate in ((True, 0.25), (False, 1.0)):
        values = json.loads((source / "config.json").read_text()) | {"learns": learns}
        (source / "config.json").write_text(json.dumps(values))
        assert main(["train", str(source), *data, "--out", str(tmp_path / str(learns)), "--device", "cpu"]) == 0
        inner = config_of(tmp_path / str(learns)).inner
        assert (inner.lr, inner.clip, inner.warmup_from) == (rate, 0.5, 0.1 * rate)
        assert json.loads((tmp_path / str(learns) / "model" / "config.json").read_text()).get("learns", True)


@pytest.mark.parametrize("method", ["swa", "full", "naive", "e2e"])
def test_the_twins_begin_with_the_same_network(home: Path, tmp_path: Path, method: str) -> None:
    """At a rate of almost 0 each is still the source, read through windows or whole; the silent MLPs are gone."""
    still = ["--steps", 1, "--lr", 1e-12, "--set", "optimizer.weight_decay=0", "--set", "optimizer.initial_lr=0"]
    assert main(command(home, tmp_path / "run", "--method", method, *still)) == 0
    source, twin = load_model(home / "converted").model, load_model(tmp_path / "run").model
    assert twin.config.num_suffix_blocks == (2 if method in ("e2e", "naive") else 0)
    assert twin.config.attention == ("full" if method == "full" else "window")
    whole = dataclasses.replace(source.config, attention=twin.config.attention)
    wanted = Transformer(whole)
    wanted.load_state_dict(source.state_dict())
    torch.testing.assert_close(losses(twin, learn=False), losses(wanted, learn=False), rtol=1e-5, atol=1e-6)
    assert (losses(wanted, learn=False) - losses(source, learn=False)).abs().max() < 1e-6 or method == "full"


def test_a_twin_of_a_model_whose_own_mlps_are_fast(home: Path, tmp_path: Path) -> None:
    """What stands behind them is silent: they are the static ones of the twin. Otherwise there is no twin."""
    model = make(**SIZES)
    silence(model, "static_mlp")
    save(tmp_path / "in-place", model)
    still = ["--method", "swa", "--steps", 1, "--lr", 1e-12, "--set", "optimizer.weight_decay=0"]
    arguments = command(home, tmp_path / "run", *still)
    arguments[1] = str(tmp_path / "in-place")
    assert main(arguments) == 0
    twin = load_model(tmp_path / "run").model
    torch.testing.assert_close(losses(twin, learn=False), losses(model, learn=False), rtol=1e-5, atol=1e-6)


def test_a_twin_that_is_none_is_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "trained", make(**SIZES))
    arguments = command(home, tmp_path / "run", "--method", "swa", "--steps", 1)
    arguments[1] = str(tmp_path / "trained")
    assert main(arguments) == 0
    assert "this run has no fast MLPs, and those of 2 blocks of" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["e2e", "swa"])
def test_only_the_suffix(home: Path, tmp_path: Path, method: str) -> None:
    """The same blocks of model and twin: all else keeps its bytes, costs no moments, and a stop changes nothing."""
    only = ["--method", method, "--only", "suffix", "--set", "optimizer.decay_steps=3", "--set", "checkpoint_every=1"]
    assert main(command(home, tmp_path / "run", *only, "--steps", 2)) == 0
    assert main(command(home, tmp_path / "run", *only, "--steps", 3, "--resume")) == 0
    assert main(command(home, tmp_path / "whole", *only, "--steps", 3, "--set", "optimizer.warmup_steps=0")) == 0
    assert config_of(tmp_path / "run").trained_blocks == 2
    source, trained = load_model(home / "converted").model.state_dict(), load_model(tmp_path / "run").model.state_dict()
    changed = {name for name in trained if (trained[name] != source[name]).any()}
    upper = {name for name in trained if name.startswith(("blocks.2.", "blocks.3.", "final_norm"))}
    assert changed == upper
    path = newest_checkpoint(tmp_path / "run")
    assert path is not None
    assert {name.rpartition(".")[0] for name in read_checkpoint(path).optimizer} == upper
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_trained_alone_has_the_gradient_that_it_has_with_all(home: Path, tmp_path: Path) -> None:
    from longread.outer_loop import end_to_end_loss, static_loss
    from longread.train.optimizer import freeze_below

    ids = torch.randint(V, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1], ids[:, 1:], torch.ones(2, 32, dtype=torch.bool)
    for blocks in (1, 2, 3):
        for recompute in ("none", "blocks", "sqrt"):
            found = []
            for frozen in (None, blocks):
                model = make(dtype=torch.float64, **SIZES)
                freeze_below(model, frozen)
                learning = end_to_end_loss(model, *batch, inner_lr=0.7, inner_clip=0.5, recompute=recompute).loss
                (learning + static_loss(model, *batch, recompute=recompute).loss).backward()
                found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            whole, alone = found
            first = f"blocks.{4 - blocks}"
            assert set(alone) == {name for name in whole if name == "final_norm.weight" or first <= name < "c"}
            for name, gradient in alone.items():
                torch.testing.assert_close(gradient, whole[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--method", "mamba2"], "a model that exists cannot become mamba2; choose e2e, naive, swa, full or hybrid"),
        (["--init", "x"], "is a model to begin with, and so is --init x; leave one out"),
        (["--mini-batch", "12"], "context_length 32 is not a multiple of model.mini_batch_size 12; use 24 or 36"),
        (["--set", "model.width=32"], "has model.width 16 and this run has 32; begin with a model of its shape"),
        (["--set", "trained_blocks=5"], "trained_blocks is 5; there are only 4 blocks"),
        (["--set", "model.vocab_size=256"], "vocab_size 256, but the data has 257"),
    ],
)
def test_an_adaptation_that_cannot_begin(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert reason in fails(capsys, *command(home, tmp_path / "run", *arguments))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no model at" in fails(capsys, *command(home, tmp_path / "run", model="nowhere"))


def test_data_of_another_tokenizer_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    assert main(["prepare", str(home / "text.txt"), "--out", str(data), "--train-tokenizer", "260"]) == 0
    arguments = command(home, tmp_path / "run")
    arguments[3] = str(data)
    assert f"prepare the data with `longread prepare --tokenizer {home / 'converted'}`" in fails(capsys, *arguments)


def test_methods_that_need_what_is_not_there() -> None:
    bare = dataclasses.replace(toy().model, num_suffix_blocks=0)
    with pytest.raises(UserError, match="method e2e needs fast MLPs and this model has none; convert it with some"):
        adapt(bare)
    assert adapt(bare, "swa").model == bare
    recurrent: ModelConfig = dataclasses.replace(bare, mixer="mamba2")
    with pytest.raises(UserError, match=r"model with model\.mixer mamba2 cannot be adapted"):
        adapt(recurrent, "swa")
