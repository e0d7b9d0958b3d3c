"""The run: what it computes, what it leaves behind, and how it goes on; test_train_refusals.py has the rest."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from longread import checkpoint, files, train as training
from longread.config import InnerConfig, ModelConfig, OptimizerConfig, RunConfig, UserError
from longread.data import Sampler, TokenDataset, prepare
from longread.model import Transformer
from longread.outer_loop import Fit, end_to_end_loss, static_loss
from longread.record import TIMING_FIELDS
from longread.tokenizer import ByteTokenizer
from longread.train import TrainingProgress, train
from longread.train.optimizer import gradient_norm

PARITY = Path(__file__).parent / "parity"
MODEL = ModelConfig(
    vocab_size=257,
    width=16,
    num_blocks=2,
    num_heads=2,
    mlp_hidden=16,
    window_size=8,
    mini_batch_size=8,
    num_suffix_blocks=1,
)
CONFIG = RunConfig(
    name="microscopic",
    model=MODEL,
    optimizer=OptimizerConfig(lr=1e-2, initial_lr=1e-4, warmup_steps=2, decay_steps=10),
    inner=InnerConfig(clip=0.15, warmup_steps=4),
    context_length=32,
    batch_size=4,
    steps=6,
    evaluate_every=4,
    checkpoint_every=2,
)


def make_data(directory: Path, seed: int = 1, validation_fraction: float = 0.3) -> TokenDataset:
    words = [f"word{(i * i * seed) % 97} " for i in range(600)]
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for i in range(6):
        (texts / f"{i}.txt").write_text("".join(words[i * 80 : i * 80 + 120]))
    return prepare(
        [texts], directory / "data", ByteTokenizer(), documents="join", validation_fraction=validation_fraction
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_data(tmp_path_factory.mktemp("data"))


def change(config: RunConfig = CONFIG, **fields: Any) -> RunConfig:
    """`config` with some fields changed; `optimizer__lr` is the field `lr` of `optimizer`."""
    for name, value in fields.items():
        part, _, field = name.partition("__")
        config = dataclasses.replace(
            config, **{part: dataclasses.replace(getattr(config, part), **{field: value}) if field else value}
        )
    return config


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


def weights_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


# What a run leaves behind


def test_a_run_learns_and_leaves_everything(tmp_path: Path, data: TokenDataset) -> None:
    config = change(steps=12, optimizer__decay_steps=12)
    seen: list[dict[str, Any]] = []
    result = train(config, data, tmp_path / "run", validation=data.validation, on_step=seen.append)
    rows = rows_of(tmp_path / "run")
    assert rows == seen
    assert result.row == rows[-1]
    assert [row["step"] for row in rows] == list(range(1, 13))
    sampler = Sampler(data, 32, 4, 0)
    assert rows[-1]["tokens"] == result.tokens == sum(int(sampler.batch(step).loss_mask.sum()) for step in range(12))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    rates = [1e-4, 5.05e-3, 0.01, 0.009755527, 0.00904604, 0.007940987]
    rates += [0.00654854, 0.005005, 0.00346146, 0.002069013, 0.00096396, 0.000254473]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-5)
    assert [row["inner_lr"] for row in rows] == pytest.approx([0.325, 0.55, 0.775, *[1.0] * 9])
    assert any(0 < row["inner_clipped"] < 1 for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8, 12]
    assert rows[-1]["validation_loss"] != rows[-1]["validation_loss_frozen"]
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").iterdir() for path in [path]}
    assert names == {"run.json", "metrics.jsonl", "tokenizer.json", "checkpoints", "model"}
    loaded = checkpoint.load_model(tmp_path / "run")
    assert checkpoint.fingerprint_of(result.model) == loaded.fingerprint
    assert loaded.tokenizer_path == tmp_path / "run" / "model" / "tokenizer.json"
    assert loaded.metadata["tokenizer_fingerprint"] == data.tokenizer_fingerprint
    assert loaded.inner == config.inner
    assert not result.interrupted
    run = files.read_json(tmp_path / "run" / "run.json", kind="run")
    assert RunConfig.from_dict(run["config"]) == config


def test_the_same_run_twice_is_the_same(tmp_path: Path, data: TokenDataset) -> None:
    for name in ("a", "b"):
        train(CONFIG, data, tmp_path / name)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    train(change(seed=1), data, tmp_path / "c")
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "c")


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "static", "recompute": "blocks"},
        {"loss": "static", "model": dataclasses.replace(MODEL, num_suffix_blocks=0, attention="full")},
        {"meta_gradient": "first-order"},
        {"truncate_after": 2, "recompute": "step"},
        {"inner__clip": None},
        {"precision": "float64"},
        {"precision": "bfloat16"},
        {"optimizer__clip": None, "optimizer__decay_embedding": False},
    ],
)
def test_every_kind_of_run_trains(tmp_path: Path, data: TokenDataset, fields: dict[str, Any]) -> None:
    config = change(**fields)
    result = train(config, data, tmp_path / "run", validation=data.validation)
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert ("inner_grad_norm" in rows[-1]) == (config.loss == "end-to-end")
    assert ("validation_loss_frozen" in rows[-1]) == (config.model.num_suffix_blocks > 0)
    wanted = torch.float64 if config.precision == "float64" else torch.float32
    assert result.model.embedding.weight.dtype == wanted
    assert result.model.dtype == (torch.bfloat16 if config.precision == "bfloat16" else wanted)


# What it computes


def gradients(config: RunConfig, data: TokenDataset) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Transformer(config.model).double()
    batch = Sampler(data, config.context_length, config.batch_size, 0).batch(0)
    found = training.accumulate_gradient(model, config, batch, inner_lr=1.0)
    return found.loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss", ["end-to-end", "static"])
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_accumulate_to_the_gradient_of_the_batch(data: TokenDataset, size: int, loss: Any) -> None:
    whole, expected = gradients(change(loss=loss), data)
    parts, found = gradients(change(loss=loss, micro_batch_size=size), data)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-14)


def test_validation_is_the_loss_of_training_on_held_out_text(data: TokenDataset) -> None:
    config = change(micro_batch_size=2, inner__warmup_steps=0)
    torch.manual_seed(0)
    model = Transformer(config.model).double()
    sampler = Sampler(data, config.context_length, config.batch_size, 3)
    found = training.validation_losses(model, config, sampler)
    batches = [sampler.batch(i) for i in range(4)]
    learning = [end_to_end_loss(model, *batch, inner_lr=1.0, inner_clip=0.15).loss.item() for batch in batches]
    frozen = [static_loss(model, *batch).loss.item() for batch in batches]
    assert found["validation_loss"] == pytest.approx(sum(learning) / 4, rel=1e-12)
    assert found["validation_loss_frozen"] == pytest.approx(sum(frozen) / 4, rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
def test_the_update_is_adamw_with_decoupled_decay_and_a_clip_by_global_norm(clip: float | None) -> None:
    config = OptimizerConfig(
        lr=0.1, initial_lr=0.02, warmup_steps=2, decay_steps=5, clip=clip, decay_embedding=False, weight_decay=0.3
    )
    torch.manual_seed(0)
    model = Transformer(MODEL).double()
    optimizer = training.make_optimizer(model, config)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, rate in enumerate([0.02, 0.06, 0.1, 0.0750025]):
        given = {name: torch.randn_like(p) for name, p in expected.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = given[name].clone()
        norm = math.sqrt(sum(g.square().sum().item() for g in given.values()))
        scale = 1.0 if clip is None or norm <= clip else clip / norm
        lr = training.update(model, optimizer, config, step, gradient_norm(model.parameters()))
        assert lr == pytest.approx(rate, rel=1e-12)
        for name, parameter in model.named_parameters():
            gradient = given[name] * scale
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient.square()
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.0 if name == "embedding.weight" else 0.3
            expected[name] = expected[name] - lr * (mean / (square.sqrt() + 1e-8) + decay * expected[name])
            torch.testing.assert_close(parameter, expected[name], rtol=1e-10, atol=1e-12, check_dtype=False)
            assert parameter.grad is None


@pytest.mark.parametrize("norm", [0.5, 0.999, 1.0, 1.001, 40.0])
def test_the_outer_clip_begins_at_its_limit(norm: float) -> None:
    gradients = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([[0.0, 4.0]], dtype=torch.float64)]
    parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * (norm / 5.0)
    assert gradient_norm(parameters).item() == pytest.approx(norm, rel=1e-14)
    training.clip_gradients(parameters, gradient_norm(parameters), 1.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * (min(norm, 1.0) / 5.0), rtol=1e-13, atol=0)


def test_the_update_is_that_of_the_official_numbers() -> None:
    for case in sorted(path.parent for path in PARITY.glob("*/expected.safetensors")):
        fields = json.loads((case / "config.json").read_text())
        outer = fields["training"]["optimizer_outer"]
        config = OptimizerConfig(
            lr=outer["lr"],
            initial_lr=outer["init_lr"],
            end_lr=outer["end_lr"],
            warmup_steps=outer["lr_warmup_steps"],
            decay_steps=outer["lr_decay_steps"],
            beta1=outer["b1"],
            beta2=outer["b2"],
            eps=outer["eps"],
            weight_decay=outer["weight_decay"],
            decay_embedding=outer["emb_wd"],
            clip=outer["clip_gradient"],
        )
        model, _ = checkpoint.import_official(case)
        expected = load_file(case / "expected.safetensors")
        for prefix in ("grad.", "after."):
            part = {name.removeprefix(prefix): t for name, t in expected.items() if name.startswith(prefix)}
            for name, tensor in checkpoint.from_official(part, model.config).items():
                parameter = model.get_parameter(name)
                if prefix == "grad.":
                    parameter.grad = tensor.clone()
                else:
                    torch.testing.assert_close(parameter, tensor, rtol=0, atol=1e-6, check_dtype=False)
            if prefix == "grad.":
                optimizer = training.make_optimizer(model, config)
                training.update(model, optimizer, config, 0, gradient_norm(model.parameters()))


# Going on


def test_what_will_not_fit_is_said(tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longread.train.settling.fit", lambda *args, **options: Fit(1, "none", 3 * 2**30))
    with pytest.warns(UserWarning, match=r"1 sequences of 32 tokens at a time need 3\.0 GiB more than there are"):
        train(change(steps=1), data, tmp_path / "run")


def test_a_run_begins_with_the_weights_of_a_model_it_extends(tmp_path: Path, data: TokenDataset) -> None:
    train(change(steps=3), data, tmp_path / "short")
    longer = change(steps=3, context_length=64, model__rope_base=1e4, optimizer__lr=1e-12, optimizer__initial_lr=0.0)
    extended = train(longer, data, tmp_path / "long", initial=tmp_path / "short")
    trained, begun = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("short", "long"))
    assert extended.model.config.rope_base == 1e4
    for name, weights in trained.items():
        torch.testing.assert_close(begun[name], weights, rtol=0, atol=1e-9)


def test_a_run_goes_on_with_or_without_the_weights_that_it_began_with(tmp_path: Path, data: TokenDataset) -> None:
    train(change(steps=3), data, tmp_path / "short")
    train(change(steps=4), data, tmp_path / "whole", initial=tmp_path / "short")
    train(change(steps=2), data, tmp_path / "run", initial=tmp_path / "short", resume=True)
    (tmp_path / "short").rename(tmp_path / "moved")
    train(change(steps=3), data, tmp_path / "run", resume=True)
    train(change(steps=4), data, tmp_path / "run", initial=tmp_path / "moved" / "model", resume=True)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    run = files.read_json(tmp_path / "run" / "run.json", kind="run")
    fingerprint = checkpoint.load_model(tmp_path / "moved").fingerprint
    tokens = rows_of(tmp_path / "moved")[-1]["tokens"]
    provenance = {"run": "microscopic", "step": 3, "tokens": tokens, "context_length": CONFIG.context_length}
    initial = {"path": str(tmp_path / "short"), "fingerprint": fingerprint, "provenance": provenance}
    assert run["initial"] == initial
    found = checkpoint.load_model(tmp_path / "run").metadata["provenance"]
    assert found["adapted_from"] == {"model": "short", "fingerprint": fingerprint, "provenance": provenance}
    assert "It began with `short`" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert files.read_json(tmp_path / "moved" / "run.json", kind="run")["initial"] is None


def test_a_run_without_a_checkpoint_begins_again_with_the_same_weights(
    tmp_path: Path, data: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    train(change(steps=3), data, tmp_path / "short")
    train(CONFIG, data, tmp_path / "whole", initial=tmp_path / "short")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, data, tmp_path / "run", initial="short", on_step=die)
    assert checkpoint.newest_checkpoint(tmp_path / "run") is None
    monkeypatch.chdir("/")
    with pytest.warns(UserWarning, match="has no checkpoint: training begins at the first step"):
        train(CONFIG, data, tmp_path / "run", resume=True)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "blocks", "sqrt"])
@pytest.mark.parametrize("loss", ["end-to-end", "static"])
def test_on_a_gpu_the_captured_gradient_is_the_plain_one(
    loss: str, recompute: str, tmp_path: Path, data: TokenDataset
) -> None:
    """Rates that change from step to step reach the graph, and its gradients the optimizer."""
    config = change(precision="float32", loss=loss, recompute=recompute, model__width=64, model__mlp_hidden=64)
    rows = {}
    for device in ("cpu", "cuda"):
        train(config, data, tmp_path / device, validation=data.validation, device=device)
        rows[device] = rows_of(tmp_path / device)
    for plain, captured in zip(rows["cpu"], rows["cuda"], strict=True):
        assert captured["peak_memory_bytes"] > 0
        assert plain.keys() - set(TIMING_FIELDS) == captured.keys() - set(TIMING_FIELDS)
        for name in plain.keys() - set(TIMING_FIELDS):
            assert captured[name] == pytest.approx(plain[name], rel=1e-3), name


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model__mlp_hidden": 24}, "mlp_hidden 16 and this run has 24; begin with a model of its shape"),
        ({"model__num_heads": 4}, "num_heads 2 and this run has 4"),
    ],
)
def test_a_model_of_another_shape_is_no_beginning(
    tmp_path: Path, data: TokenDataset, fields: dict[str, Any], reason: str
) -> None:
    train(change(steps=1), data, tmp_path / "short")
    with pytest.raises(UserError, match=reason):
        train(change(**fields), data, tmp_path / "long", initial=tmp_path / "short")
    assert not (tmp_path / "long").exists()


# What people watch


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_the_numbers(tmp_path: Path, data: TokenDataset, terminal: bool) -> None:
    screen = io.StringIO()
    with TrainingProgress(CONFIG, Console(file=screen, force_terminal=terminal, width=200)) as progress:
        train(CONFIG, data, tmp_path / "run", validation=data.validation, on_step=progress)
    for words in ("6/6", "loss ", "validation ", "frozen ", "tokens/s", "grad ", "inner grad ", "% clipped"):
        assert words in screen.getvalue()


def test_a_tracker_gets_the_rows(tmp_path: Path, data: TokenDataset) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(CONFIG, data, tmp_path / "run", trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("loss")]
    assert found == pytest.approx([row["loss"] for row in rows_of(tmp_path / "run")])
