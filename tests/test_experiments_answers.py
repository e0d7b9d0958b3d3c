"""What the jobs about answers read: the pretrained model as it was, and stretches of books."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiments.adapted import answers, rehearsal

from longread.cli import main as longread
from longread.cli.models import read_whole
from longread.loading import open_model
from longread.tokenizer import train_bpe

TEXT = "\n\n".join(f"Paragraph {i} says nothing but {i * i % 97}." for i in range(200))


def test_the_original_reads_as_the_reader_with_full_attention(tmp_path: Path) -> None:
    train_bpe([TEXT], 300).save(tmp_path)
    (tmp_path / "index.json").write_text('{"vocab_size": 300}')
    rehearsal.tiny_llama(tmp_path / "tiny", tmp_path)
    window = ["--window", "16", "--mini-batch", "8", "--suffix", "8"]
    assert longread(["convert", str(tmp_path / "tiny"), str(tmp_path / "reader"), *window]) == 0
    assert answers.main(["original", str(tmp_path / "reader"), str(tmp_path / "original")]) == 0
    reader, original = (open_model(tmp_path / name, "cpu") for name in ("reader", "original"))
    assert original.model.config.num_suffix_blocks == 0
    losses = [opened.session(learn=False).read(TEXT[:200])[1:] for opened in (read_whole(reader), original, reader)]
    assert torch.allclose(losses[0], losses[1], atol=1e-4)
    assert (losses[2] - losses[1]).abs().max() > 1e-2  # a window hides what it reads


def test_stretches_begin_with_paragraphs_at_equal_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "STRETCH_CHARACTERS", 500)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(TEXT)
    assert answers.main(["stretches", str(tmp_path / "books"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "ready").exists()
    found = [path.read_text() for path in sorted((tmp_path / "out" / "texts").iterdir())]
    places = [TEXT.index(stretch) for stretch in found]
    assert places[0] == 0
    assert all(abs(place - len(TEXT) * i / 4) < 50 for i, place in enumerate(places))
    assert all(stretch.startswith("Paragraph") and 490 < len(stretch) <= 500 for stretch in found)
