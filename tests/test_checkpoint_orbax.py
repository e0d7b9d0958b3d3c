"""Official checkpoints: trees that Orbax itself has written, in each of its layouts, become Longread models."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
import torch
from torch import Tensor

from longread import recipes
from longread.checkpoint import find_orbax_item, from_official, import_official, load_model
from longread.checkpoint.orbax import OrbaxArrays
from longread.cli import main
from longread.config import InnerConfig
from longread.files import read_safetensors
from longread.inner_loop import next_token_logits
from longread.loading import open_model
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests import tiny
from tests.official_trees import LAYOUTS, Module, Official, drawn, save, size, tree, weight

PARITY = Path(__file__).parent / "parity"
DIALS = ("--size", "tiny", "--window", "6", "--mini-batch", "4")


def convert(source: Path, destination: Path, *more: str) -> int:
    return main(["convert", str(source), str(destination), *DIALS, *more])


@pytest.fixture(autouse=True)
def a_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.SIZES, "tiny", size())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the official code, of which step 10 has `drawn(0)`."""
    directory = tmp_path_factory.mktemp("official") / "run"
    with ocp.CheckpointManager(directory) as manager:
        for step, seed in ((9, 1), (10, 0)):
            item = ocp.args.StandardSave(tree(drawn(seed)))
            manager.save(step, args=ocp.args.Composite(model_weights=item, opt_state=item), force=True)
    return directory


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An item in one of the layouts."""
    directory, made = tmp_path_factory.mktemp("items"), {}

    def saved(layout: str) -> Path:
        if layout not in made:
            made[layout] = save(directory / layout, tree(drawn()), layout)
        return made[layout]

    return saved


def check(directory: Path, official: Official, **changes: object) -> None:
    loaded = load_model(directory)
    config = tiny.config(**{"init_std": 0.02} | changes)
    assert (loaded.model.config, loaded.inner) == (config, InnerConfig())
    state, wanted = loaded.model.state_dict(), from_official(official, config)
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


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


# --- what is refused, in one sentence, with nothing left behind ---


def refused(source: Path, destination: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    before = sorted(destination.parent.iterdir())
    assert main(["convert", str(source), str(destination), *options]) == 2
    assert sorted(destination.parent.iterdir()) == before
    output = capsys.readouterr()
    assert not output.out
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    ("options", "row", "reason"),
    [
        (
            [],
            {},
            "so its size must be named: it has 4 blocks of width 16 with heads of 8; give --size tiny",
        ),
        ([], {"width": 32}, "none of the sizes has them: 1b, 125m, 350m, 760m, 1.3b, 3b, tiny"),
        (["--size", "125m"], {}, "and 125m has 12 blocks of width 768 with heads of 64; give --size tiny"),
        (["--size", "1b"], {}, "and 1b has 24 blocks of width 2048 with heads of 64; give --size tiny"),
        (
            ["--size", "tiny"],
            {"num_heads": 4},
            "and tiny has 4 blocks of width 16 with heads of 4; none of the sizes has them",
        ),
        (["--size", "7b"], {}, "there is no size 7b; choose one of 1b, 125m, 350m, 760m, 1.3b, 3b, tiny"),
    ],
)
def test_a_size_that_does_not_fit(
    options: list[str],
    row: dict[str, int],
    reason: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(recipes.SIZES, "tiny", size(**row))
    assert reason in refused(run, tmp_path / "model", capsys, *options)


def without(name: str) -> Callable[[Official], Any]:
    def changed(official: Official) -> Module:
        whole = tree(official)
        *path, last = name.split(".")
        node = whole.children["language_model"].children["model"]
        for part in path:
            node = node.children[part]
        node.children[last] = None
        return whole

    return changed


def with_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Official], Any]:
    return lambda official: tree(official | {name: change(official[name])})


def with_more(official: Official) -> Module:
    whole = tree(official)
    whole.children["language_model"].children["model"].children["wpe"] = weight(torch.ones(3))
    return whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("wte.weight"), "lacks the array wte.weight; copy it again, or give another checkpoint"),
        (without("h.blocks.feed_forward.w3.weight"), "lacks the array h.blocks.feed_forward.w3.weight"),
        (without("h.prime_storage.ffn_prime_norm.weight"), "lacks the array h.prime_storage.ffn_prime_norm.weight"),
        (without("h.prime_storage"), "has no h.prime_storage: a baseline, of which nothing tells"),
        (with_more, "holds language_model.model.wpe.weight, which the official network has no place for"),
        (lambda official: {"weights": torch.ones(3).numpy()}, "holds weights, which the official network has no place"),
        (
            with_tensor("blocks.w2", lambda w2: w2[:, 1:]),
            "feed_forward.w2.weight has shape (4, 23, 16), and beside the other arrays it must have (4, 24, 16)",
        ),
        (with_tensor("blocks.wq", lambda wq: wq[0]), "wq.weight has shape (16, 16); it must have 3 dimensions"),
        (with_tensor("embed.weight", lambda embed: embed.int()), "wte.weight holds int32, no floating-point numbers"),
    ],
)
def test_a_tree_that_is_no_official_model(
    change: Callable[[Official], Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "saved", change(drawn()))
    assert reason in refused(source, tmp_path / "model", capsys, *DIALS)


def removed(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WQ = "language_model.model.h.blocks.seq_modeling_block.wq.weight"


@pytest.mark.parametrize(
    ("layout", "file", "damage", "reason"),
    [
        ("ocdbt", "d/*", removed, "cannot read "),
        ("ocdbt", "d/*", cut_short, "cannot read "),
        ("ocdbt", "ocdbt.process_0", removed, "cannot read "),
        ("ocdbt", "manifest.ocdbt", removed, "holds no arrays: neither manifest.ocdbt nor folders with Zarr arrays"),
        ("ocdbt", "manifest.ocdbt", cut_short, "cannot read manifest.ocdbt of "),
        ("ocdbt, zarr 3", "d/*", removed, "cannot read "),
        (
            "ocdbt",
            "_METADATA",
            cut_short,
            "_METADATA is damaged: it describes no tree of Orbax; copy the checkpoint again",
        ),
        ("ocdbt", "_METADATA", removed, "cannot read "),
        ("files", WQ, removed, f"lacks the array {WQ}, which its _METADATA lists; copy it again"),
        ("files", f"{WQ}/0.0.0", removed, f"cannot read {WQ} of "),
        ("files", f"{WQ}/0.0.0", cut_short, f"cannot read {WQ} of "),
        ("files", f"{WQ}/.zarray", cut_short, f"cannot read {WQ} of "),
        ("files, zarr 3", f"{WQ}/c/0/0/0", removed, f"cannot read {WQ} of "),
        ("files, zarr 3", f"{WQ}/c/0/0/0", cut_short, f"cannot read {WQ} of "),
    ],
)
def test_a_damaged_copy(
    layout: str,
    file: str,
    damage: Callable[[Path], None],
    reason: str,
    item: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "copied"
    shutil.copytree(item(layout), source)
    (path,) = source.glob(file)
    damage(path)
    said = refused(source, tmp_path / "model", capsys, *DIALS)
    assert reason in said
    assert "tensorstore_spec" not in said


def test_one_of_many_chunks_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of arrays that were spread over devices. Zarr alone would read zeros there."""
    weights = tree(drawn())
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=512), weights)
    source = save(tmp_path / "saved", weights, "files", save_args=pieces)
    assert convert(source, tmp_path / "model") == 0
    check(tmp_path / "model", drawn())
    capsys.readouterr()
    chunks = sorted(path for path in (source / WQ).iterdir() if path.name[0] != ".")
    assert len(chunks) > 1
    chunks[-1].unlink()
    assert f"cannot read {WQ} of" in refused(source, tmp_path / "other", capsys, *DIALS)


def test_options_of_an_orbax_checkpoint_only(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(run, tmp_path / "model") == 0
    capsys.readouterr()
    assert "--size" in refused(tmp_path / "model", tmp_path / "other", capsys, "--size", "tiny")
    assert "leave out --scheme" in refused(run, tmp_path / "other", capsys, *DIALS, "--scheme", "in-place")
    assert "leave out --drop-fast" in refused(run, tmp_path / "other", capsys, *DIALS, "--drop-fast")
    assert main(["convert", "gs://bucket/125m", f"{tmp_path}/other", *DIALS]) == 2
    assert "gs://bucket/125m is not on this machine; copy it" in capsys.readouterr().err


def test_without_tensorstore(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert "need tensorstore; run pip install tensorstore" in refused(run, tmp_path / "model", capsys, *DIALS)


def test_what_is_no_orbax_checkpoint(run: Path, tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    assert find_orbax_item(tmp_path, "model_weights") is None
    assert find_orbax_item(tmp_path / "nowhere", "model_weights") is None
    assert find_orbax_item(run, "model_weights") == run / "10" / "model_weights"
    assert find_orbax_item(run, "other") is None
