"""Official checkpoints: trees that Orbax itself has written, in each of its layouts, become Longread models."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longread import recipes
from longread.checkpoint import import_official, load_model
from longread.checkpoint.orbax import OrbaxArrays
from longread.cli import main
from longread.files import read_safetensors
from longread.inner_loop import next_token_logits
from longread.loading import open_model
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests import tiny
from tests.official_trees import LAYOUTS, check, convert, drawn, items_in, save, save_run, size, tree

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(autouse=True)
def a_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.SIZES, "tiny", size())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("official") / "run")


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return items_in(tmp_path_factory.mktemp("items"))


@pytest.mark.parametrize("named", ["run", "step", "item"])
def test_a_run_of_the_official_code(named: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"run": run, "step": run / "10", "item": run / "10" / "model_weights"}[named]
    assert convert(source, tmp_path / "model") == 0
    said = capsys.readouterr().out
    assert "the last 2 of 4 blocks learn every 4 tokens, window 6, MLPs 24 wide (Table 3: 128)" in said
    check(tmp_path / "model", drawn())
    provenance = {"converted_from": source.name, "size": "tiny", "step": 10}
    assert load_model(tmp_path / "model").metadata["provenance"] == provenance
    assert load_model(tmp_path / "model").learns


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(layout: str, item: Callable[[str], Path], tmp_path: Path) -> None:
    assert convert(item(layout), tmp_path / "model") == 0
    check(tmp_path / "model", drawn())


@pytest.mark.parametrize("layout", ["ocdbt", "files"])
@pytest.mark.parametrize("case", ["09-e2e-long", "06-e2e-untied"])
def test_the_same_model_as_from_the_numbers(
    case: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases of the official code, which tests/parity compares with it, but for the rotary base of Table 3."""
    shutil.copytree(PARITY / case, tmp_path / "numbers")
    fields = json.loads((PARITY / case / "config.json").read_text())
    fields["model"]["rope_theta"] = 5e5
    (tmp_path / "numbers" / "config.json").write_text(json.dumps(fields))
    wanted, _ = import_official(tmp_path / "numbers")
    config = wanted.config
    row = size(num_blocks=config.num_blocks, width=config.width, num_heads=config.num_heads)
    monkeypatch.setitem(recipes.SIZES, "tiny", row)

    tensors, _ = read_safetensors(PARITY / case / "weights.safetensors")
    source = save(tmp_path / "saved", tree(tensors), layout)
    dials = ["--window", str(config.window_size), "--mini-batch", str(config.mini_batch_size)]
    assert convert(source, tmp_path / "model", *dials) == 0
    model = load_model(tmp_path / "model").model
    assert model.config == dataclasses.replace(config, init_std=0.02)
    tokens = [i % config.vocab_size for i in range(2 * config.mini_batch_size + 3)]
    mine, theirs = Session(model, tiny.INNER), Session(wanted, tiny.INNER)
    assert torch.equal(mine.read(tokens)[1:], theirs.read(tokens)[1:])
    assert torch.equal(*(next_token_logits(session.model, session.state) for session in (mine, theirs)))


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"tie_embeddings": False, "num_suffix_blocks": 4}, "ocdbt"),
        ({"fast_hidden": 8, "vocab_size": 301}, "files, zarr 3"),
        ({"dtype": torch.bfloat16}, "ocdbt"),
        ({"dtype": torch.bfloat16}, "files"),
        ({"dtype": torch.float16}, "ocdbt, zarr 3"),
    ],
)
def test_what_only_the_arrays_tell(changes: dict[str, Any], layout: str, tmp_path: Path) -> None:
    official = drawn(**changes)
    assert convert(save(tmp_path / "saved", tree(official), layout), tmp_path / "model") == 0
    check(tmp_path / "model", official, **{name: value for name, value in changes.items() if name != "dtype"})


def test_arrays_of_several_types_become_one_that_holds_all(tmp_path: Path) -> None:
    official = drawn(dtype=torch.bfloat16)
    official["embed.weight"] = official["embed.weight"].half()
    assert convert(save(tmp_path / "saved", tree(official)), tmp_path / "model") == 0
    check(tmp_path / "model", {name: tensor.float() for name, tensor in official.items()})


def test_window_and_mini_batch_are_those_of_table_3(run: Path, tmp_path: Path) -> None:
    assert main(["convert", str(run), f"{tmp_path}/model", "--size", "tiny"]) == 0
    config = load_model(tmp_path / "model").model.config
    assert (config.window_size, config.mini_batch_size, config.rope_base) == (8192, 1024, 5e5)


def test_the_released_sizes_have_names() -> None:
    """125m, 1b and 3b; the paper calls the second 1.3B."""
    from longread.checkpoint.official_orbax import OFFICIAL_SIZES

    assert OFFICIAL_SIZES == {"1b": "1.3b"}
    shapes = {size: (recipes.SIZES[OFFICIAL_SIZES.get(size, size)]) for size in ("125m", "1b", "3b")}
    assert [(row.num_blocks, row.width, row.num_heads) for row in shapes.values()] == [
        (12, 768, 12),
        (24, 2048, 32),
        (32, 2560, 32),
    ]


@pytest.mark.parametrize("layout", ["ocdbt", "files"])
def test_arrays_are_read_once_and_one_is_held(
    layout: str, item: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive, most = [], [], []
    whole = OrbaxArrays.read

    def reading(arrays: OrbaxArrays, name: str) -> Tensor:
        most.append(sum(held() is not None for held in alive))
        read.append(name)
        tensor = whole(arrays, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(OrbaxArrays, "read", reading)
    assert convert(item(layout), tmp_path / "model") == 0
    assert len(read) == len(set(read)) == 20
    assert max(most) == 0  # the one before is gone


def test_its_tokenizer(
    run: Path, item: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(run, tmp_path / "without") == 0
    assert "without a tokenizer: name one with --tokenizer" in capsys.readouterr().out
    ByteTokenizer().save(tmp_path / "bytes")
    assert convert(run, tmp_path / "small", "--tokenizer", f"{tmp_path}/bytes/tokenizer.json") == 2
    assert "has 257 tokens and the model knows 19" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()

    source = save(tmp_path / "saved", tree(drawn(vocab_size=300)))
    assert convert(source, tmp_path / "named", "--tokenizer", f"{tmp_path}/bytes") == 0
    assert (tmp_path / "named" / "tokenizer.json").is_file()
    assert convert(source, tmp_path / "nowhere", "--tokenizer", f"{tmp_path}/nothing.json") == 2
    capsys.readouterr()
    ByteTokenizer().save(source)
    assert convert(source, tmp_path / "with") == 0
    assert "with its tokenizer" in capsys.readouterr().out
    session = open_model(tmp_path / "with", "cpu").session()
    assert session.read("a text").isfinite()[1:].all()
