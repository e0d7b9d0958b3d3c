"""Where prepared data goes: it appears as a whole or not at all, and nothing valid is lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.data import PrepareProgress, TokenDataset, prepare
from longread.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def text_of(dataset: TokenDataset) -> str:
    return BYTES.decode(dataset.tokens(0, dataset.num_tokens))


def tree(directory: Path) -> dict[str, bytes]:
    """Everything below `directory`, hidden files and empty folders included."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """A dataset at `out`, and what its files hold."""
    (tmp_path / "old.txt").write_text("the old data")
    prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES)
    return tree(tmp_path)


def test_an_existing_dataset_is_refused(old: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out exists; choose another place, or ask to overwrite"):
        prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES)
    assert tree(tmp_path) == old


def test_overwriting_replaces_all_of_it(old: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "out" / "tokens-00009.bin").write_bytes(b"stale")
    (tmp_path / "new.txt").write_text("the new data")
    assert text_of(prepare([tmp_path / "new.txt"], tmp_path / "out", BYTES, overwrite=True)) == "the new data"
    assert set(tree(tmp_path)) == {*old, "new.txt"}


def test_overwriting_through_a_link_keeps_the_link(old: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    prepare([tmp_path / "old.txt"], tmp_path / "link", BYTES, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert set(tree(tmp_path)) == {*old, "link"}


def test_overwriting_spares_what_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("a cat")
    for out in (tmp_path / "photos", tmp_path / "photos" / "cat.txt"):
        with pytest.raises(UserError, match="exists; choose another place"):
            prepare([tmp_path / "photos" / "cat.txt"], out, BYTES, overwrite=True)
    assert (tmp_path / "photos" / "cat.txt").read_text() == "a cat"


def test_an_empty_directory_is_taken(old: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert text_of(prepare([tmp_path / "old.txt"], tmp_path / "empty", BYTES)) == "the old data"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_and_loses_nothing(overwrite: bool, old: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"much text " * 50_000)
    before = tree(tmp_path)
    out = tmp_path / "out" if overwrite else tmp_path / "deep" / "down"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write fails in the middle, as on a full disk
    try:
        with pytest.raises(UserError, match=f"cannot write {out}: File too large"):
            prepare([tmp_path / "big.txt"], out, BYTES, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", ["mkdir", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_read_only_place(
    failing: str, overwrite: bool, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name.endswith(".new"):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, *arguments, **options)

    real = getattr(Path, failing)
    monkeypatch.setattr(Path, failing, refuse)
    out = tmp_path / ("out" if overwrite else "elsewhere")
    with pytest.raises(UserError, match=f"cannot write {out}: Read-only file system"):
        prepare([tmp_path / "old.txt"], out, BYTES, overwrite=overwrite)
    assert tree(tmp_path) == old


def test_an_interruption_leaves_nothing(old: dict[str, bytes], tmp_path: Path) -> None:
    def interrupt(progress: PrepareProgress) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES, overwrite=True, progress=interrupt)
    assert tree(tmp_path) == old


def test_the_place_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(UserError, match=r"cannot write .*: File exists"):
        prepare([tmp_path / "x.txt"], tmp_path / "x.txt" / "out", BYTES)


# --- killed, or in the company of others, while a dataset is replaced ---


def before_rename(number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `act` happen before the rename of that number, counted from 1; what `act` renames counts as well."""
    real, renames = Path.rename, itertools.count(1)

    def rename(path: Path, target: Path) -> Path:
        if next(renames) == number:
            act()
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)


def kill_before(touch: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that replaces `out` dies before its first rename, its second, or the deletion after them."""
    (directory / "new.txt").write_text("the new data")
    child = os.fork()
    if child == 0:
        try:
            before_rename(touch, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            prepare([directory / "new.txt"], directory / "out", BYTES, validation_fraction=0, overwrite=True)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize(("touch", "found"), [(1, "the old data"), (2, "the new data"), (3, "the new data")])
def test_a_kill_leaves_the_old_data_or_the_new(
    touch: int, found: str, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before(touch, tmp_path, monkeypatch)
    assert (tmp_path / "out").exists() == (touch != 2)
    assert text_of(TokenDataset.open(tmp_path / "out")) == found
    if touch == 2:
        assert set(tree(tmp_path)) == {*old, "new.txt"}


def test_preparing_after_a_kill_finds_the_dataset_in_its_place(
    old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before(2, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="out exists; choose another place, or ask to overwrite"):
        prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES)
    assert text_of(TokenDataset.open(tmp_path / "out")) == "the new data"
    kill_before(2, tmp_path, monkeypatch)
    assert text_of(prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES, overwrite=True)) == "the old data"
    assert tree(tmp_path) == {**old, "new.txt": b"the new data"}


@pytest.mark.parametrize("touch", [1, 3])
def test_the_next_one_removes_what_a_kill_has_left(
    touch: int, old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before(touch, tmp_path, monkeypatch)
    assert set(tree(tmp_path)) > {*old, "new.txt"}
    prepare([tmp_path / "new.txt"], tmp_path / "out", BYTES, overwrite=True)
    assert set(tree(tmp_path)) == {*old, "new.txt"}


def test_what_another_process_is_writing_is_not_removed(
    old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.txt").write_text("the new data")
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before_rename(1, lambda: (os.write(ready[1], b"x"), os.read(go_on[0], 1)), monkeypatch)
            prepare([tmp_path / "new.txt"], tmp_path / "out", BYTES, overwrite=True)
            os._exit(0)
        finally:
            os._exit(1)
    os.read(ready[0], 1)
    assert text_of(prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES, overwrite=True)) == "the old data"
    os.write(go_on[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert text_of(TokenDataset.open(tmp_path / "out")) == "the new data"
    assert set(tree(tmp_path)) == {*old, "new.txt"}


def test_a_held_out_part_is_found_after_a_kill(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    prepare([f"{tmp_path}/*.txt"], tmp_path / "out", BYTES, validation_fraction=0.5)
    shutil.copytree(tmp_path / "out", tmp_path / ".out.0123abcd.old")
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.new")
    assert TokenDataset.open(tmp_path / "out" / "validation").num_documents > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("names", [(".out.0123abcd.old",), (".out.0123abcd.new",), (".out.0123abcd.old", ".out.0.new")])
@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_replacement_is_left_alone(
    names: tuple[str, ...], there: bool, old: dict[str, bytes], tmp_path: Path
) -> None:
    for name in names:
        shutil.copytree(tmp_path / "out", tmp_path / name)
    if not there:
        shutil.rmtree(tmp_path / "out")
    before = tree(tmp_path)
    if there:
        TokenDataset.open(tmp_path / "out")
    else:
        with pytest.raises(UserError, match="holds no prepared tokens"):
            TokenDataset.open(tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_replacement_that_cannot_be_finished_is_named(
    old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    kill_before(2, tmp_path, monkeypatch)
    before = tree(tmp_path)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        UserError, match=r"replacing .*out was interrupted .*: Read-only file system; rename .*\.new to it"
    ):
        TokenDataset.open(tmp_path / "out")
    assert tree(tmp_path) == before


def test_whoever_opens_between_the_renames_takes_the_second(
    old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    before_rename(2, lambda: found.append(text_of(TokenDataset.open(tmp_path / "out"))), monkeypatch)
    (tmp_path / "new.txt").write_text("the new data")
    assert text_of(prepare([tmp_path / "new.txt"], tmp_path / "out", BYTES, overwrite=True)) == "the new data"
    assert found == ["the new data"]
    assert set(tree(tmp_path)) == {*old, "new.txt"}


def test_data_of_another_process_are_not_replaced_by_old_ones(
    old: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.txt").write_text("the new data")
    (tmp_path / "other.txt").write_text("other data")
    prepare([tmp_path / "other.txt"], tmp_path / "other", BYTES)
    before_rename(2, lambda: shutil.copytree(tmp_path / "other", tmp_path / "out"), monkeypatch)
    with pytest.raises(UserError, match=r"cannot write .*out: Directory not empty"):
        prepare([tmp_path / "new.txt"], tmp_path / "out", BYTES, overwrite=True)
    assert text_of(TokenDataset.open(tmp_path / "out")) == "other data"
