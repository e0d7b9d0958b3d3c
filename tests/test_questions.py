"""Questions made from texts: the text tells the right answer where it is said to, and nothing gives it away."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from longread.checkpoint import save_model
from longread.cli import main
from longread.config import InnerConfig, ModelConfig
from longread.evaluate import (
    AskedText,
    Candidate,
    Question,
    QuestionAnswering,
    answer_figures,
    answer_questions,
    make_questions,
)
from longread.evaluate.prose_facts import prose_facts
from longread.evaluate.source_facts import source_facts
from longread.model import Transformer, initialize
from longread.session import Session
from longread.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

NAMES = (
    *("Alder", "Birch", "Cedar", "Elm", "Fern", "Gorse", "Hazel", "Ivy"),
    *("Juniper", "Laurel", "Maple", "Nettle", "Olive", "Poplar", "Rowan", "Sorrel"),
)
TITLES = ("Captain", "Mrs.", "Doctor", "Sir", "Aunt", "Colonel", "Lady", "Judge")
PROSE = "It was a cold — and “naïve” — night.\n\n" + "\n\n".join(
    f"On day number {i} a tired walker went slowly over the long hill and met {NAMES[i % 16]} there. "
    f"They counted {i * 37} pebbles in the small wooden box before {TITLES[i % 8]} {NAMES[i % 8]} came\nhome."
    for i in range(60)
)
SOURCE = '''"""A module."""
import os


class Shape(object):
    """Something flat."""

    def area(self, scale=1.5, *, unit="m²"):
        """Compute how much it covers."""
        return f"no such piece of a string {scale}"


class Square(Shape):
    def side(self, places=os.sep):
        raise ValueError("a square must have sides")

    def area(self, exact=True, scale=None):
        print("twice said, so it tells nothing")
        return "twice said, so it tells nothing"


async def draw(shape, /, color="red", *parts, width=2):
    """Draw a shape on the screen.

    More of it.
    """
    return [shape for _ in "short text"]
'''
INNER = InnerConfig(lr=0.7, clip=0.5)
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": train_bpe([PROSE, SOURCE], 400)}


def encoded(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    ids, lengths = tokenizer.encode_with_bytes(text)
    return np.array([*tokenizer.beginning, *ids]), np.array([0] * len(tokenizer.beginning) + lengths)


def asked(tokenizer: Tokenizer, text: str, T: int, **options: int) -> list[Question]:
    return make_questions(
        text, encoded(tokenizer, text)[1], tokenizer, T, **{"per_kind": 6, "num_choices": 5} | options
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prose_tells_the_answer_and_the_question_does_not(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens, _ = encoded(tokenizer, PROSE)
    T = len(tokens) * 3 // 4
    questions = asked(tokenizer, PROSE, T)
    read = " ".join(tokenizer.decode(tokens[:T].tolist()).split())
    assert {question.kind for question in questions} == {"name", "sentence", "title"}
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        answer, *wrong = (choice.text for choice in question.choices)
        quote = question.text.rpartition('"')[2] if '"' in question.text else question.text.split()[-1]
        assert f"{quote}{answer}" in read
        assert quote == question.text.split()[-1] or read.count(quote) == 1
        assert tokenizer.decode([*question.ids, *question.choices[0].ids]).endswith(question.text + answer)
        evidence = tokenizer.decode(tokens[: question.evidence_end].tolist())
        assert re.sub(r"\s+", " ", evidence).rstrip(".,").endswith(answer)
        assert question.distance == T - question.evidence_end >= 0
        assert len(set(question.choices)) == 5
        for other in wrong:
            assert other.strip() in read
            assert other.strip() not in question.text
            assert not any(other.startswith(text) for text in (answer, *wrong) if text is not other)
        if answer.startswith(" box"):  # and there are enough that begin with the same word
            assert all(other.startswith(" box") for other in wrong)
    assert any(question.choices[0].text.startswith(" box") for question in questions)


def test_names_are_those_that_the_text_never_writes_small() -> None:
    """Neither the first word of a sentence, nor a title, nor a word that is written in lower case too."""
    text = "One two three four five six seven eight nine. Then we all went home. They saw that Mr. Alder and the Birch "
    text += "and a birch stood by Cedar's old\nElm, and I did. Fern"
    named = [fact.answer for fact in prose_facts(text, 1000) if fact.form == "name"]
    assert sorted(named) == [" Alder", " Alder", " Cedar", " Elm"]  # Alder for his title too


def test_a_title_of_two_is_not_asked_for() -> None:
    text = "We saw Mr. Alder and Mr. Birch and Captain Cedar, and again Captain Cedar and Captain\nElm and Sir Fern."
    told = {fact.question.split()[-1]: fact.answer for fact in prose_facts(text, 1000) if fact.kind == "title"}
    assert told == {"Sir": " Fern"}
    assert {f.question.split()[-1] for f in prose_facts(text, text.index("Elm"))} == {"Captain"}  # what was not read


def test_source_tells_just_this() -> None:
    facts = source_facts(SOURCE, len(SOURCE.encode()))
    assert facts is not None
    start = "\n\n# In the code above, the "
    assert {(fact.kind, fact.question.removeprefix(start), fact.answer) for fact in facts} == {
        ("docstring", "function with the docstring 'Compute how much it covers.' is", " area"),
        ("docstring", "function with the docstring 'Draw a shape on the screen.' is", " draw"),
        ("message", "message 'a square must have sides' is in the function", " side"),
        ("method", "method side() is defined in the class", " Square"),
        ("base", "class Shape is derived from the class", " object"),
        ("base", "class Square is derived from the class", " Shape"),
        ("default", "default value of the parameter places of side() is", " os.sep"),
        ("default", "default value of the parameter color of draw() is", ' "red"'),
        ("default", "default value of the parameter width of draw() is", " 2"),
    }
    ends = {fact.answer: SOURCE.encode()[: fact.evidence_end].decode() for fact in facts}
    assert ends[" side"].endswith('"a square must have sides"')
    assert ends[" 2"].endswith("width=2")
    assert ends[" draw"].endswith('"""Draw a shape on the screen.\n')
    assert ends[" Square"].endswith("def side(self, places=os.sep):\n")
    half = len(SOURCE.encode()) // 2
    assert source_facts(SOURCE, half) == [fact for fact in facts if fact.evidence_end <= half]
    assert source_facts("Nothing but words.", 10) is source_facts("x = 1", 5) is None
    deep = f"def f():\n    return {' + '.join(['1'] * 1500)}\n"  # Python parses it, and nothing walks through it
    assert source_facts(deep, len(deep)) is None


def test_questions_depend_on_their_text_alone_and_on_what_was_read() -> None:
    tokenizer = TOKENIZERS["bpe"]
    T = 600
    questions = asked(tokenizer, PROSE, T)
    assert questions == asked(tokenizer, PROSE, T)
    assert questions != asked(tokenizer, PROSE, T, seed=1)
    tokens, lengths = encoded(tokenizer, PROSE)
    beginning = PROSE.encode()[: lengths[:T].sum()].decode(errors="ignore")
    assert questions == asked(tokenizer, beginning, T)
    assert [q.evidence_end for q in questions] == sorted(q.evidence_end for q in questions)
    assert max(q.evidence_end for q in questions) <= T < len(tokens)
    assert max(sum(q.kind == kind for q in questions) for kind in ("name", "sentence", "title")) <= 6


def model(suffix: int = 1) -> Transformer:
    config = ModelConfig(
        vocab_size=400,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=24,
        mini_batch_size=16,
        num_suffix_blocks=suffix,
    )
    made = Transformer(config).double()
    initialize(made, seed=1)
    return made.requires_grad_(False)


@pytest.mark.parametrize(("suffix", "learn"), [(1, True), (1, False), (0, False)])
def test_answers_are_those_of_a_session_that_has_read_as_much(suffix: int, learn: bool) -> None:
    """−log p of every choice, and what greedy decoding writes; in any batch, and however often was asked before."""
    tokenizer, reader = TOKENIZERS["bpe"], model(suffix)
    tokens, _ = encoded(tokenizer, PROSE)
    questions = [q for T in (40, 105) for q in _by_hand(reader, tokens, T, learn=learn)]
    text = AskedText("prose", tokens[:105], questions)
    found = answer_questions("it", reader, INNER, [text], learn=learn, batch_size=5)
    assert found.reading == ("learning" if learn else "frozen" if suffix else "static")
    assert [trial.is_greedy for trial in found.trials] == [True, False] * 2
    for question, trial in zip(questions, found.trials, strict=True):
        session = Session(reader, INNER, learn=learn)
        session.read(tokens[: question.context_length])
        session.learn = False
        session.read(question.ids)
        expected = [session.score(choice.ids).sum().item() for choice in question.choices]
        assert trial.nats == pytest.approx(expected, abs=1e-9)
        assert trial.is_right == (expected[0] < min(expected[1:]))
        assert (trial.kind, trial.distance) == (question.kind, question.context_length - 3)
    for size in (1, 64):
        again = answer_questions("it", reader, INNER, [text], learn=learn, batch_size=size)
        assert [t.nats for t in again.trials] == [pytest.approx(t.nats, abs=1e-9) for t in found.trials]


def _by_hand(reader: Transformer, tokens: np.ndarray, T: int, *, learn: bool) -> list[Question]:
    """One question that is answered as greedy decoding goes on, and one that is not."""
    asked_for = tuple(tokens[7:12].tolist())
    session = Session(reader, INNER, learn=learn)
    session.read(tokens[:T])
    session.learn = False
    session.read(asked_for)
    likeliest = tuple(session.fork().generate(3, temperature=0))
    others = [(*likeliest[:2], (likeliest[2] + 1) % 400), (5, 6), (9, 8, 7, 6)]
    choices = [Candidate(str(ids), ids) for ids in (likeliest, *others)]
    return [
        Question("kind", T, 3, "?", asked_for, tuple(choices)),
        Question("kind", T, 3, "?", asked_for, tuple(choices[::-1])),
    ]


def test_what_is_read_is_what_matters() -> None:
    """Learning, frozen and with nothing read are three readings, and the last does not depend on the text."""
    tokenizer, reader = TOKENIZERS["bpe"], model()
    tokens, _ = encoded(tokenizer, PROSE)
    texts = [AskedText("prose", tokens[:600], asked(tokenizer, PROSE, 600))]
    ways: list[dict[str, bool | list[int]]] = [{"learn": True}, {"learn": False}]
    ways.append({"learn": False, "beginning": tokenizer.beginning})
    learning, frozen, nothing = (answer_questions("it", reader, INNER, texts, **way) for way in ways)  # type: ignore[arg-type]
    assert nothing.reading == "nothing read"
    for one, other in ((learning, frozen), (frozen, nothing), (learning, nothing)):
        assert max(abs(a.nats[0] - b.nats[0]) for a, b in zip(one.trials, other.trials, strict=True)) > 1e-4
    elsewhere = [texts[0]._replace(tokens=tokens[::-1][:600].copy())]
    again = answer_questions("it", reader, INNER, elsewhere, learn=False, beginning=tokenizer.beginning)
    assert [t.nats for t in again.trials] == [t.nats for t in nothing.trials]
    question = texts[0].questions[0]
    session = Session(reader, INNER, learn=False)
    session.read([*tokenizer.beginning, *question.ids])
    expected = session.read(question.choices[0].ids).sum().item()
    assert nothing.trials[0].nats[0] == pytest.approx(expected, abs=1e-9)
    answering = QuestionAnswering([learning, frozen, nothing], 5)
    table = answering.as_json()["results"][0]
    right = [trial.is_right for trial in learning.trials]
    assert table["by_context"][0]["right"]["mean"] == sum(right) / len(right)
    assert sum(entry["right"]["n"] for entry in table["by_kind"]) == len(right)
    figures = answer_figures(answering)
    assert [grid.columns for grid in figures.grids] == [["it, learning", "it, frozen", "it, nothing read"]] * 5
    assert len(figures.charts[0].lines) == 3


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model", "other"):
        reader = model().float()
        tokenizer = TOKENIZERS["bpe"] if name == "model" else train_bpe([PROSE], 300)
        save_model(tmp_path / name, reader, INNER, tokenizer_fingerprint=tokenizer.fingerprint)
        tokenizer.save(tmp_path / name)
    (tmp_path / "text.txt").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_asks_all_readers_the_same(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["questions", "model", "--data", "text.txt", "--contexts", "300", "600", "--choices", "4"]
    assert main([*command, "--questions", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "Right of 4 choices, with 95 % intervals",
        "model, nothing read",
        "by kind of question",
        "sentence",
        "questions, 1 text; who takes one of 4 choices by chance is right 0.25 of the time.",
    ):
        assert expected in " ".join(out.split())
    assert main([*command, "--device", "cpu", "--no-control", "--quiet", "--json", "a.json"]) == 0
    assert (home / "a.json").stat().st_mode & 0o77 == 0  # it quotes the text
    found = json.loads((home / "a.json").read_text())
    assert found["format"] == "longread-questions/1"
    assert [entry["at"] for entry in found["results"][0]["by_context"]] == [300, 600]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model", "--choices", "1"], "--choices 1 is not between 2 and 26"),
        (["model", "--contexts", "60"], "of no text can 6 answers of one kind be found; lower --choices"),
        (["model", "--contexts", "999999"], "no document has 999999 tokens; lower --contexts or give longer texts"),
        (["model", "other"], "other has another tokenizer than model: a context would be another length of text"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["questions", *arguments, "--data", "text.txt", "--device", "cpu"]) == 2
    assert f"longread: error: {sentence}" in capsys.readouterr().err


def test_evidence_is_found_in_what_a_tokenizer_makes_of_a_text(home: Path) -> None:
    """One that normalises covers other bytes of the text that it is given than of the text that it is asked about."""
    definition = json.loads((home / "model" / "tokenizer.json").read_text())
    (home / "model" / "tokenizer.json").write_text(json.dumps(definition | {"normalizer": {"type": "NFC"}}))
    tokenizer = load_tokenizer(home / "model")
    save_model(home / "model", model().float(), INNER, tokenizer_fingerprint=tokenizer.fingerprint)
    composed = "caf\u00e9 " * 50 + PROSE
    command = ["questions", "model", "--contexts", "900", "--device", "cpu", "--no-control", "--quiet"]
    trials = []
    for form in ("NFC", "NFD"):
        (home / f"{form}.txt").write_text(unicodedata.normalize(form, composed))
        assert main([*command, "--data", f"{form}.txt", "--json", f"{form}.json"]) == 0
        trials.append(json.loads((home / f"{form}.json").read_text())["results"][0]["trials"])
    assert trials[0] == trials[1]


def test_tokens_without_a_text_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    definition = json.loads((home / "model" / "tokenizer.json").read_text())
    once = {"type": "Replace", "pattern": {"String": "the"}, "content": "xthe"}
    (home / "model" / "tokenizer.json").write_text(json.dumps(definition | {"normalizer": once}))
    tokenizer = load_tokenizer(home / "model")
    save_model(home / "model", model().float(), INNER, tokenizer_fingerprint=tokenizer.fingerprint)
    assert main(["questions", "model", "--data", "text.txt", "--contexts", "600", "--device", "cpu"]) == 2
    assert "model decodes the tokens of text 1 to a text of other tokens" in capsys.readouterr().err
