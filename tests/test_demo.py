"""The demo, but for its ten minutes of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples.demo import clear

from longread.config import UserError


def test_an_earlier_demo_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    clear(tmp_path / "missing")
    (tmp_path / "e2e").mkdir()
    (tmp_path / "summary.json").touch()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
    for name in ("thesis.txt", "data"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="other files than those of an earlier demo"):
        clear(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "thesis.txt").unlink()
    with pytest.raises(UserError):  # no data set of ours
        clear(tmp_path)
