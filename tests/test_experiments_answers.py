"""What the jobs about answers read: the pretrained model as it was, and stretches of books."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiments.adapted import answers, rehearsal
from experiments.pages import answers as page
from experiments.results import Results

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


def trial(question: str, distance: int, nats: list[float], written: bool) -> dict[str, object]:
    facts = {"text": "text 5", "context_length": 8192, "kind": "name", "question": question, "distance": distance}
    return facts | {"nats": nats, "is_greedy": written, "is_right": nats[0] < min(nats[1:])}


def test_the_page_counts_pairs_and_what_reading_adds() -> None:
    """One question that nothing read gets right and reading gets wrong but for what it adds, one the other way round,
    and one inside the window."""
    before = [[1.0, 2.0, 3.0], [5.0, 4.0, 3.0], [5.0, 4.0, 3.0]]
    after = [[0.9, 0.5, 3.0], [1.0, 3.0, 3.0], [1.0, 3.0, 3.0]]
    results = [
        {"model": "first-order", "reading": reading, "trials": [*map(trial, "abc", (2000, 3000, 10), nats, written)]}
        for reading, nats, written in (
            ("learning", after, (False, True, True)),
            ("frozen", before, (False, False, True)),
            ("nothing read", before, (False, False, False)),
        )
    ]
    twin = {"model": "full", "reading": "static", "trials": [trial("b", 3000, [2.0, 3.0, 3.0], True)]}
    found = Results()
    found.evaluated("questions-books", "questions", {"results": results})
    found.evaluated("questions-books", "questions-full", {"results": [twin]})
    gathered = page.gather(found)
    kept = gathered["questions"]["books"]["readers"]["reader, learning"]
    assert kept == {"right": "011", "written": "011", "gained": "011", "nats": [0.9, 1.0, 1.0]}
    assert gathered["questions"]["books"]["readers"]["full-attention twin"]["right"] == "-1-"
    assert gathered["questions"]["books"]["asked"]["text"] == [1, 1, 1]
    made = {table.caption: [list(row) for row in table.rows] for table in page.tables(gathered)}
    pairs = made["Two readers, questions about books, evidence beyond the window:"]
    assert pairs[0] == ["reader, learning, against reader, frozen", "2", "1", "1", "1", "1", "0", "1", "+2.05"]
    assert pairs[2][:4] == ["reader, learning, against full-attention twin", "1", "0", "0"]
    near = made["Questions about books, by tokens after the evidence, right / written:"]
    assert near[0] == ["reader, learning", "1.00 / 1.00", "0.00 / 0.00", "1.00 / 1.00"]


def test_what_was_written_without_the_penalty_has_a_table_of_its_own() -> None:
    def verdicts(nats: float, *writers: tuple[str, str]) -> dict[str, object]:
        score = {"nats_per_token": {"mean": nats, "low": nats - 0.5, "high": nats + 0.5}}
        places = [{"start": start, "end": start + 8, "score": score} for start in (0, 8)]
        made = [
            {"writer": writer, "reading": reading, "continuation": score, "repeated": {"mean": 0}}
            | {"by_position": places, "seconds": 1.0}
            for writer, reading in writers
        ]
        return {"judge": "original", "documents": 2, "prompt_tokens": 8, "verdicts": made}

    found, human = Results(), ("human text", "human")
    found.evaluated("judge", "written", verdicts(5.0, human, ("first-order", "learning")))
    found.evaluated("judge-plain", "written", verdicts(4.0, human, ("first-order", "learning"), ("full", "static")))
    made = {table.caption: list(table.rows) for table in page.tables(page.gather(found))}
    assert [row[:3] for row in made["What the pretrained model makes of continuations, nats per token:"]] == [
        ["human text", "5.00", "5.000 ± 0.500"],
        ["reader, learning", "5.00", "5.000 ± 0.500"],
    ]
    caption = "What the pretrained model makes of continuations without the repetition penalty, nats per token:"
    assert [row[:2] for row in made[caption]] == [
        ["human text", "4.00"],
        ["reader, learning", "4.00"],
        ["full-attention twin", "4.00"],
    ]


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
