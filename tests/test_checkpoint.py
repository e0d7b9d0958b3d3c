"""Files are written whole or not at all, and a file that is not what it should be is refused with the reason."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longread import checkpoint
from longread.config import InnerConfig, ModelConfig, UserError
from longread.model import Transformer

CONFIG = ModelConfig(
    vocab_size=11,
    width=8,
    num_blocks=2,
    num_heads=2,
    mlp_hidden=6,
    window_size=4,
    mini_batch_size=4,
    num_suffix_blocks=1,
)
INNER = InnerConfig(lr=0.5, warmup_steps=3)


def make_model(seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(dataclasses.replace(CONFIG, **changes))


def some_tensors() -> dict[str, Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(7),
        "c": torch.arange(4).to(torch.bfloat16),
        "none": torch.empty(0, 3),
    }


def write_run(run: Path, *steps: int, keep: int = 2) -> Path:
    for step in steps:
        model = make_model(step)
        moments = {f"{name}.exp_avg": torch.full_like(p, step) for name, p in model.named_parameters()}
        path = checkpoint.write_checkpoint(
            run, step, model=model, inner=INNER, optimizer=moments, state={"tokens": 10 * step}, keep=keep
        )
    return path


def flip(path: Path, position: int, bit: int = 0) -> None:
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1 << bit
    path.write_bytes(contents)


def equal(model: Transformer, other: Transformer) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# Models


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, number: int, call: int) -> None:
    """Lets the `call`-th use of os.`function` fail with error `number`."""
    real, calls = getattr(os, function), itertools.count()

    def refusing(*args: object, **kwargs: object) -> object:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, refusing)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"num_suffix_blocks": 0, "attention": "full"}])
def test_a_model_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    model = make_model(**changes)
    checkpoint.save_model(tmp_path / "m", model, INNER, "abc", {"step": 3})
    random_state = torch.get_rng_state()
    loaded = checkpoint.load_model(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert equal(loaded.model, model)
    assert loaded.model.config == model.config
    assert loaded.inner == INNER
    assert loaded.fingerprint == checkpoint.fingerprint_of(model) == checkpoint.fingerprint_of(loaded.model)
    assert loaded.metadata["tokenizer_fingerprint"] == "abc"
    assert loaded.metadata["provenance"] == {"step": 3}
    assert loaded.tokenizer_path is None
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert checkpoint.load_model(tmp_path / "m").tokenizer_path == tmp_path / "m" / "tokenizer.json"
    assert checkpoint.load_model(tmp_path / "m", dtype=torch.float64).model.embedding.weight.dtype == torch.float64


def test_a_model_keeps_its_precision(tmp_path: Path) -> None:
    model = make_model().double()
    with torch.no_grad():
        model.final_norm.weight.add_(1e-12)
    checkpoint.save_model(tmp_path / "m", model, INNER, None)
    loaded = checkpoint.load_model(tmp_path / "m")
    assert loaded.model.final_norm.weight.dtype == torch.float64
    assert equal(loaded.model, model)
    assert checkpoint.fingerprint_of(loaded.model) == loaded.fingerprint


def test_the_fingerprint_sees_config_and_every_weight() -> None:
    seen = {checkpoint.fingerprint_of(make_model(seed)) for seed in (0, 1)}
    seen.add(checkpoint.fingerprint_of(make_model(window_size=5)))
    nudged = make_model()
    with torch.no_grad():
        nudged.final_norm.weight[3] = torch.nextafter(nudged.final_norm.weight[3], torch.tensor(2.0))
    seen.add(checkpoint.fingerprint_of(nudged))
    assert len(seen) == 4
    assert checkpoint.fingerprint_of(make_model()) in seen


def test_weights_and_config_of_different_models_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        checkpoint.save_model(tmp_path / str(seed), make_model(seed), INNER, None)
    os.replace(tmp_path / "1" / "config.json", tmp_path / "0" / "config.json")
    with pytest.raises(UserError, match="different models"):
        checkpoint.load_model(tmp_path / "0")


def edit(path: Path, *keys: str, value: object) -> None:
    values = json.loads(path.read_text())
    table = values
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (("model", "mlp_hidden"), 7, r"static_mlp.gate.weight has shape \(6, 8\), but the config asks for \(7, 8\)"),
        (("model", "num_suffix_blocks"), 2, "lacks blocks.0.fast_mlp"),
        (("model", "num_suffix_blocks"), 0, "holds blocks.1.fast_mlp"),
        (("model", "width"), -8, "width is -8"),
        (("model", "colour"), "red", "no field 'colour'"),
        (("inner", "lr"), "fast", "lr is 'fast'"),
        (("model",), None, "does not describe a model"),
        (("format",), "other", "not written by Longread"),
        (("format_version",), 99, "upgrade Longread"),
        (("kind",), "session", "holds session, not model"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, keys: tuple[str, ...], value: object, reason: str
) -> None:
    checkpoint.save_model(tmp_path / "m", make_model(), INNER, None)
    edit(tmp_path / "m" / "config.json", *keys, value=value)
    with pytest.raises(UserError, match=reason):
        checkpoint.load_model(tmp_path / "m")


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    old, new = make_model(0), make_model(1)
    checkpoint.save_model(tmp_path / "m", old, INNER, None)
    refuse(monkeypatch, "fsync", errno.ENOSPC, call)
    if call < 2:  # the first two make the files durable, before anything is renamed
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save_model(tmp_path / "m", new, INNER, None)
        assert equal(checkpoint.load_model(tmp_path / "m").model, old)
    elif call == 2:
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save_model(tmp_path / "m", new, INNER, None)
        assert equal(checkpoint.load_model(tmp_path / "m").model, new)
    else:
        checkpoint.save_model(tmp_path / "m", new, INNER, None)
    assert sorted(child.name for child in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model at"):
        checkpoint.load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        checkpoint.load_model(tmp_path)


# Checkpoints of a run


def test_a_checkpoint_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) is None
    path = write_run(tmp_path, 5, 10, 15)
    assert checkpoint.newest_checkpoint(tmp_path) == path
    found = checkpoint.read_checkpoint(path)
    assert (found.step, found.state["tokens"]) == (15, 150)
    assert all(torch.equal(found.model[name], tensor) for name, tensor in make_model(15).state_dict().items())
    assert found.optimizer["final_norm.weight.exp_avg"].unique() == 15
    names = sorted(child.name for child in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000015"]


def test_a_model_is_found_in_a_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    path = write_run(tmp_path, 1, 2)
    for place in (tmp_path, path):
        loaded = checkpoint.load_model(place)
        assert equal(loaded.model, make_model(2))
        assert loaded.tokenizer_path == tmp_path / "tokenizer.json"
    assert equal(checkpoint.load_model(path.with_name("step-00000001")).model, make_model(1))
    checkpoint.save_model(tmp_path / "model", make_model(9), INNER, None)
    assert equal(checkpoint.load_model(tmp_path).model, make_model(9))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "COMMITTED"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, name: str, damage: str) -> None:
    path = write_run(tmp_path, 1, 2)
    file = path / name
    if damage == "flip":
        flip(file, file.stat().st_size // 2)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError):
        checkpoint.read_checkpoint(path)
    with pytest.raises(UserError):
        checkpoint.load_model(path)
    if (name, damage) == ("COMMITTED", "delete"):
        assert checkpoint.newest_checkpoint(tmp_path) == path.with_name("step-00000001")
        return
    with pytest.warns(UserWarning, match="going back to step-00000001"):
        assert checkpoint.newest_checkpoint(tmp_path) == path.with_name("step-00000001")
    flip(path.with_name("step-00000001") / "state.json", 9)
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used"):
        checkpoint.newest_checkpoint(tmp_path)


def written_or_refused(run: Path) -> Path | None:
    try:
        return write_run(run, 2)
    except UserError as error:
        if "No space left" not in str(error):
            raise
        return None


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_during_a_checkpoint_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    older = write_run(tmp_path, 1)
    for call in itertools.count():
        with monkeypatch.context() as patch:
            refuse(patch, function, errno.ENOSPC, call)
            if (newer := written_or_refused(tmp_path)) is not None:
                break
        newest = checkpoint.newest_checkpoint(tmp_path)
        assert newest is not None
        assert checkpoint.read_checkpoint(newest).step == int(newest.name[-1])
    assert call >= 2
    assert checkpoint.newest_checkpoint(tmp_path) == newer
    assert sorted((tmp_path / "checkpoints").iterdir()) == [older, newer]


def test_a_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path: Path) -> None:
    path = write_run(tmp_path, 1)
    (path / "COMMITTED").unlink()
    (path / "rubbish").write_text("")
    (path.parent / ".step-00000001.1234.tmp").mkdir()
    (path.parent / ".tmpAb12Cd").write_text("")
    assert write_run(tmp_path, 1) == path == checkpoint.newest_checkpoint(tmp_path)
    assert [child.name for child in path.parent.iterdir()] == [path.name]


# The official layout


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"num_suffix_blocks": 0, "attention": "full"}, {"num_suffix_blocks": 2}]
)
def test_the_official_layout_there_and_back(tmp_path: Path, changes: dict[str, object]) -> None:
    model = make_model(**changes)
    checkpoint.export_official(tmp_path, model, INNER)
    back, inner = checkpoint.import_official(tmp_path)
    assert equal(back, model)
    assert back.config == model.config
    assert inner == INNER


def test_the_official_layout_stacks_and_transposes() -> None:
    model = make_model()
    official = checkpoint.to_official(model.state_dict(), CONFIG)
    assert official["blocks.w1"].shape == (2, 8, 6)
    assert official["prime.w2"].shape == (1, 6, 8)
    assert torch.equal(official["blocks.wo"][1], model.blocks[1].attention.output.weight.T)
    assert torch.equal(official["prime.w3"][0], model.blocks[1].fast_mlp.up.weight.T)
    assert torch.equal(official["embed.weight"], model.embedding.weight)
    wrong = official | {"prime.w1": official["prime.w1"].repeat(2, 1, 1)}
    with pytest.raises(UserError, match=r"prime\.w1 has 2 blocks, but the config has 1"):
        checkpoint.from_official(wrong, CONFIG)


def test_an_incomplete_official_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config of the official layout"):
        checkpoint.import_official(tmp_path)
    checkpoint.export_official(tmp_path, make_model(), INNER)
    official = checkpoint.to_official(make_model().state_dict(), CONFIG)
    del official["blocks.wq"]
    save_file(official, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"lacks blocks\.0\.attention\.query\.weight"):
        checkpoint.import_official(tmp_path)
    edit(tmp_path / "config.json", "model", "seq_modeling_block", value="Mamba2")
    with pytest.raises(UserError, match="seq_modeling_block is 'Mamba2'"):
        checkpoint.import_official(tmp_path)
    with pytest.raises(UserError, match="hybrid has no name"):
        checkpoint.export_official(tmp_path, make_model(attention="hybrid"), INNER)
