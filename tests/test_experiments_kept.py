"""Jobs with kept tokens: models of the same weights, and what is kept where something else than surprise decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from experiments.adapted import kept, recall
from experiments.pages import kept_tokens as page
from experiments.pages.answers import Asked
from experiments.results import Results

from longread.evaluate import VARIANTS, Sample, essays, make_samples
from longread.loading import OpenModel, open_model
from tests.small_model import TEXT, save_small_model

CONTEXT = 700


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_small_model(tmp_path / "model", seed=1, window_size=64)
    assert kept.main(["save", str(tmp_path / "model"), str(tmp_path / "kept"), "--tokens", "240", "--run", "4"]) == 0
    return tmp_path / "kept"


def prompts(opened: OpenModel) -> list[Sample]:
    hay = essays([TEXT], opened.tokenizer, CONTEXT, repeat=True)
    return make_samples(opened.tokenizer, VARIANTS[2], hay, CONTEXT, (0.2, 0.5), 1, seed=0)


def test_the_same_weights_keep_tokens(model: Path) -> None:
    opened, base = open_model(model, "cpu"), open_model(model.parent / "model", "cpu")
    assert (opened.model.config.kept_tokens, opened.model.config.kept_run) == (240, 4)
    assert torch.equal(opened.model.embedding.weight, base.model.embedding.weight)
    assert opened.session().read(TEXT)[1:40].equal(base.session().read(TEXT)[1:40])


@pytest.mark.parametrize("learn", [True, False])
def test_an_oracle_keeps_each_needle_and_the_first_tokens(model: Path, learn: bool) -> None:
    opened = open_model(model, "cpu")
    samples = prompts(opened)
    state = kept.read_choosing(opened, samples, learn=learn, choose=kept.NEEDLES)
    assert state.position == (CONTEXT - 1 - 1) // 32 * 32
    assert state.kept is not None
    for row, sample in zip(state.kept.position.tolist(), samples, strict=True):
        assert {*range(4), *range(sample.needle_start, sample.needle_end)} <= {*row}


def test_by_chance_the_first_tokens_stay_and_what_else_has_nothing_to_do_with_its_loss(model: Path) -> None:
    opened = open_model(model, "cpu")
    samples = prompts(opened)
    states = [kept.read_choosing(opened, samples, learn=False, choose=kept.CHANCE) for _ in range(2)]
    assert states[0].kept is not None
    assert states[1].kept is not None
    assert torch.equal(states[0].kept.position, states[1].kept.position)
    assert states[0].kept.position[:, :4].tolist() == [[0, 1, 2, 3]] * 2
    assert states[0].kept.surprise[:, 4:].max() < 1


@pytest.mark.parametrize("choose", [None, kept.NEEDLES])
def test_needles_are_asked_for_as_the_command_line_asks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choose: str | None
) -> None:
    for name, value in (("VARIANTS", (2,)), ("DEPTHS", (0.3,)), ("PER_DEPTH", 2), ("ANSWER_TOKENS", 3)):
        monkeypatch.setattr(recall, name, value)
    (tmp_path / "book.txt").write_text(TEXT * 9, encoding="utf-8")
    out = tmp_path / "out" / "asked.json"
    arguments = ["ask", str(model), "--haystack", str(tmp_path / "book.txt"), "--contexts", str(CONTEXT)]
    arguments += ["--longest", str(CONTEXT), "--json", str(out), *(["--choose", choose] if choose else [])]
    assert kept.main(arguments) == 0
    results = json.loads(out.read_text())["results"]
    assert [result["reading"] for result in results] == ["learning", "frozen"]
    assert all(len(result["trials"]) == 2 for result in results)
    costs = [trial["value_nats"] for trial in results[1]["trials"]]
    assert all(0 < cost < 100 for cost in costs)
    assert kept.main([*arguments, "--readings", "frozen"]) == 0
    (alone,) = json.loads(out.read_text())["results"]
    assert (alone["reading"], alone["trials"]) == ("frozen", results[1]["trials"])


def test_questions_of_readers_that_keep_tokens_have_their_tables() -> None:
    """Of evidence beyond the window alone, with the pairs that were asked the same."""

    def trial(question: str, distance: int, right: bool) -> dict[str, object]:
        facts = {"text": "text 1", "context_length": 8192, "kind": "name", "question": question, "distance": distance}
        return facts | {"is_right": right, "is_greedy": False, "nats": [1.0 if right else 3.0, 2.0]}

    results = []
    for model, right in (("kept-1024", (True, True, True)), ("first-order", (True, False, False))):
        places = zip("abc", (10, 2000, 3000), right, strict=True)
        trials = [trial(*place) for place in places]
        results.append({"model": model, "reading": "learning", "trials": trials})
    found = Results()
    found.evaluations = {"questions-kept": {"questions": {"results": results}}}
    gathered = page.gather(found)
    shown, pairs = page._about(Asked(gathered["questions"]["books"]))
    assert shown.rows == [
        ["1024 kept, learning", "2", "1.00", "0.00", "1.00"],
        ["reader, learning", "2", "0.00", "0.00", "3.00"],
    ]
    assert [row[:4] for row in pairs.rows] == [["1024 kept, learning, against reader, learning", "2", "2", "0"]]


def test_the_page_says_which_needles_were_found_at_which_context() -> None:
    def trial(context: int, inside: bool, found: bool, depth: float = 0.5) -> dict[str, object]:
        where = {"variant": "S-NIAH-2", "context_length": context, "inside_window": inside, "depth": depth}
        return where | {"found": found, "value_nats": 1.0 if found else 20.0, "diverged_at": None}

    far = [4096, 4096, 4096, 16384]
    found = Results()
    for job, right in (("needle-first-order", "0000"), ("kept-256", "1110"), ("kept-256-needle", "1111")):
        trials = [trial(4096, True, True), *(trial(c, False, r == "1") for c, r in zip(far, right, strict=True))]
        trials.append(trial(4096, False, True, 0.0))
        found.evaluations[job] = {"question": {"results": [{"reading": "learning", "trials": trials, "seconds": 4.0}]}}
    tables = {table.caption: table for table in page.tables(page.gather(found))}
    shown = tables["S-NIAH-2, needles found:"]
    assert shown.head == ["", "4,096", "16,384"]
    assert [list(row) for row in shown.rows] == [
        ["reader, learning", "0 of 3", "0 of 1"],
        ["256 kept, learning", "3 of 3", "0 of 1"],
        ["256 kept, the needle always, learning", "3 of 3", "1 of 1"],
    ]
    beginning = tables["S-NIAH-2, needles found at the beginning of the text:"]
    assert [row[1] for row in beginning.rows] == ["1 of 1"] * 3
    pairs = [list(row) for row in tables[page._PAIRS].rows]
    assert pairs[0][:5] == ["256 kept, reader", "S-NIAH-2", "4", "3", "0"]
