"""Official checkpoints that are refused, in one sentence, with nothing left behind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
import torch
from torch import Tensor

from longread import recipes
from longread.checkpoint import find_orbax_item
from longread.cli import main
from tests.official_trees import (
    DIALS,
    Module,
    Official,
    check,
    convert,
    drawn,
    items_in,
    save,
    save_run,
    size,
    tree,
    weight,
)

WQ = "language_model.model.h.blocks.seq_modeling_block.wq.weight"


@pytest.fixture(autouse=True)
def a_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.SIZES, "tiny", size())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("official") / "run")


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return items_in(tmp_path_factory.mktemp("items"))


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
