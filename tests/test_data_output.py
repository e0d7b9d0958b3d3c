"""Where prepared data goes: it appears as a whole or not at all, and nothing valid is lost."""

from __future__ import annotations

import contextlib
import errno
import resource
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.data import Progress, TokenDataset, prepare
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
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        prepare([tmp_path / "old.txt"], tmp_path / "out", BYTES, overwrite=True, progress=interrupt)
    assert tree(tmp_path) == old


def test_the_place_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(UserError, match=r"cannot write .*: File exists"):
        prepare([tmp_path / "x.txt"], tmp_path / "x.txt" / "out", BYTES)
