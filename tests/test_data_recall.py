"""Facts in training sequences: what goes in, where, and that nothing of the test does."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from longread import recipes
from longread.config import UserError
from longread.data import Batch, RecallSampler, Sampler, TokenDataset, prepare, recall
from longread.data.recall import (
    ADJECTIVES,
    LEAST_DISTANCE,
    NAMES,
    NOUNS,
    SURNAMES,
    WORDINGS,
    Fact,
    draw_fact,
)
from longread.data.shards import ShardWriter
from longread.evaluate import haystack
from longread.tokenizer import ByteTokenizer
from longread.train import train
from longread.train.beginning import training_sampler
from tests import tiny

TEXT = " ".join(f"This is sentence {i} of a plain book." for i in range(2000))
T = 4096
TOKENIZER = ByteTokenizer()


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[:1500])
    return prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "data", TOKENIZER)


def sampler(dataset: TokenDataset, share: float = 0.2, seed: int = 0, batch_size: int = 4) -> RecallSampler:
    return RecallSampler(dataset, T, batch_size, seed, share=share, tokenizer=TOKENIZER)


def texts(batch: torch.Tensor) -> list[str]:
    return [TOKENIZER.decode(row.tolist()) for row in batch]


def found_facts(text: str) -> list[tuple[int, int, str]]:
    """Where each fact and the answer to its question begin, and its value."""
    found = []
    for statement, question in WORDINGS:
        pattern = re.escape(statement).replace(r"\{", "{").replace(r"\}", "}")
        pattern = pattern.format(what=r"([a-z]+ [a-z]+)", key=r"(\w+[ -]\w+)", value=r"([0-9a-f-]+)")
        for match in re.finditer(pattern, text):
            words = dict(zip(re.findall(r"\{(\w+)\}", statement), match.groups(), strict=True))
            asked = text.find(question.format(**words), match.end())
            if asked >= 0:
                found.append((match.start(), asked, words["value"]))
    return found


def test_every_fact_is_asked_for_later_and_the_text_stays_what_it_was(dataset: TokenDataset) -> None:
    plain, batch = Sampler(dataset, T, 4, 0).batch(0), sampler(dataset).batch(0)
    assert [x.shape for x in batch] == [x.shape for x in plain]
    assert torch.equal(batch.input_ids[:, 1:], batch.target_ids[:, :-1])
    for before, after in zip(texts(plain.input_ids), texts(batch.input_ids), strict=True):
        facts = found_facts(after)
        assert facts
        assert all(start < asked for start, asked, _ in facts)
        rest = after
        for statement, question in WORDINGS:
            for wording in (question, statement):
                pattern = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
                rest = re.sub(
                    r"[ \n]" + pattern.format(what="[a-z ]+", key=r"\w+[ -]\w+", value="[0-9a-f-]+"), "", rest
                )
        assert before.startswith(rest.rstrip("\x00")[:1000])


def test_the_share_of_tokens_and_distances_are_as_asked_for(dataset: TokenDataset) -> None:
    distances, inserted, tokens = [], 0, 0
    for step in range(12):
        for row, mask in zip(*(sampler(dataset, 0.1).batch(step)[i] for i in (0, 2)), strict=True):
            if mask.all():
                text = TOKENIZER.decode(row.tolist())
                plain = sum(map(len, re.findall(r" This is sentence \d+ of a plain book\.", text)))
                inserted, tokens = inserted + T - plain, tokens + T
                distances += [asked - start for start, asked, _ in found_facts(text)]
    assert 0.08 < inserted / tokens < 0.13
    assert len(distances) > 60
    assert max(distances) > 0.85 * T
    assert 0.35 * T < np.mean(distances) < 0.65 * T


def test_facts_stand_between_sentences(dataset: TokenDataset) -> None:
    (text,) = texts(sampler(dataset, batch_size=1).batch(0).input_ids)
    assert len(found_facts(text)) > 3
    for start, asked, _ in found_facts(text):
        assert text[start - 2] in ".!?"
        assert text[asked - 2] in ".!?"


def test_no_question_comes_sooner_than_it_may(dataset: TokenDataset) -> None:
    made, draw = sampler(dataset), random.Random(0)
    text = np.array(TOKENIZER.encode("It is so. " * 20))
    placed = [made._placed(draw, [([1], [2])], text) for _ in range(200)]
    distances = [question.place - fact.place for fact, question in placed]
    assert min(distances) >= LEAST_DISTANCE
    assert all((fact.tokens, question.tokens) == ([1], [2]) for fact, question in placed)
    assert sum(text[fact.place - 1] == ord(".") for fact, _ in placed) > 100  # after a sentence, mostly


@pytest.mark.parametrize(
    ("length", "share", "reason"),
    [
        (102_400, 0.5, r"recall is 0\.5, and 256 facts, .* of 102400 tokens; lower it, or the context length"),
        (256, 0.2, r"takes about \d+ tokens, more than there is room for in a context of 256; give a longer one"),
    ],
)
def test_a_share_that_facts_cannot_make_up_is_refused(
    dataset: TokenDataset, length: int, share: float, reason: str
) -> None:
    config = recipes.adapt(tiny.config(vocab_size=257), "e2e", context_length=length, batch_size=2)
    with pytest.raises(UserError, match=reason):
        training_sampler(dataclasses.replace(config, recall=share), dataset)
    training_sampler(dataclasses.replace(config, context_length=51_200, recall=0.5), dataset)


def test_what_is_drawn_depends_on_seed_and_place_alone(dataset: TokenDataset) -> None:
    whole = sampler(dataset).batch(3)
    for rank in range(2):
        share = sampler(dataset).batch(3, rank, 2)
        assert all(torch.equal(a, b[2 * rank :][:2]) for a, b in zip(share, whole, strict=True))
    assert not torch.equal(sampler(dataset, seed=1).batch(3).input_ids, whole.input_ids)
    epochs = [texts(sampler(dataset, batch_size=dataset.num_tokens // T + 1).batch(step).input_ids) for step in (0, 1)]
    values = [{value for text in epoch for _, _, value in found_facts(text)} for epoch in epochs]
    assert not values[0] & values[1]


def test_short_documents_keep_their_padding_masked(dataset: TokenDataset) -> None:
    for step in range(20):
        tokens, _, mask = sampler(dataset, 0.3, batch_size=1).batch(step)
        if not mask.all():
            counted = int(mask.sum())
            text = TOKENIZER.decode(tokens[0, : counted + 1].tolist())
            assert found_facts(text)
            assert mask[0, :counted].all()
            assert not mask[0, counted:].any()
            assert not tokens[0, counted + 1 :].any() or set(tokens[0, counted + 1 :].tolist()) == {TOKENIZER.bos_id}
            return
    pytest.fail("no window was padded")


def test_a_batch_has_the_types_of_any_other(dataset: TokenDataset) -> None:
    for batch in (sampler(dataset, 0.3, batch_size=8).batch(step) for step in range(3)):
        assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.bool]


def test_each_sequence_asks_for_a_key_once_and_has_so_many_facts_at_most(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [Fact("It is so.", "Is it so?", key, "0") for key in ("a", "b", "b", "a", "c", "b", "d", "e")]
    with monkeypatch.context() as patch:
        facts = iter(few * 99)
        patch.setattr(recall, "draw_fact", lambda draw: next(facts))
        patch.setattr(recall, "MOST_FACTS", 4)
        made = sampler(dataset)._pairs(random.Random(0), T)
    assert len(made) == 4
    assert next(facts).key == "e"  # after a, b, c and d, and others that were there already


def test_where_nothing_fits_the_text_stays_as_it_is(dataset: TokenDataset) -> None:
    plain = Sampler(dataset, 128, 4, 0).batch(0)
    drawn = RecallSampler(dataset, 128, 4, 0, share=0.5, tokenizer=TOKENIZER).batch(0)
    assert all(torch.equal(a, b) for a, b in zip(plain, drawn, strict=True))
    none = sampler(dataset, 0.0).batch(0)
    assert all(torch.equal(a, b) for a, b in zip(Sampler(dataset, T, 4, 0).batch(0), none, strict=True))


@pytest.mark.parametrize("share", [-0.1, 0.51])
def test_a_share_beyond_its_limits_is_refused(dataset: TokenDataset, share: float) -> None:
    with pytest.raises(UserError, match=rf"recall is {share}; it must lie between 0 and 0\.5"):
        sampler(dataset, share)


@pytest.mark.parametrize("text", ["word " * 2000, "word " * 400 + "end. " + "word " * 1600], ids=["none", "one"])
def test_without_sentences_the_distance_is_kept(tmp_path: Path, text: str) -> None:
    """Of two places that are nearest to one border, neither goes there."""
    (tmp_path / "words.txt").write_text(text)
    words = prepare([tmp_path / "words.txt"], tmp_path / "data", TOKENIZER)
    made = [texts(sampler(words, 0.1, seed=seed, batch_size=2).batch(0).input_ids) for seed in range(12)]
    facts = [fact for both in made for row in both for fact in found_facts(row)]
    assert len(facts) > 30
    assert all(asked - start >= LEAST_DISTANCE for start, asked, _ in facts)


def test_a_vocabulary_may_be_larger_than_its_tokenizer_s(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    writer = ShardWriter(tmp_path / "data", 300, 1 << 20)
    writer.begin_document("x", None)
    writer.add(np.array([256, *TOKENIZER.encode(TEXT[:3000]), 299, *TOKENIZER.encode(TEXT[:3000])]), None)
    facts = {"bos_id": 256, "tokenizer": TOKENIZER.fingerprint, "documents": "reset", "skipped": {}}
    writer.finish(facts)
    tokens = sampler(TokenDataset.open(tmp_path / "data"), batch_size=1).batch(0).input_ids
    assert found_facts(TOKENIZER.decode([token for token in tokens[0].tolist() if token < 256]))


def test_nothing_of_the_test_is_trained_on() -> None:
    assert not set(ADJECTIVES.split()) & set(haystack.ADJECTIVES.split())
    assert not set(NOUNS.split()) & set(haystack.NOUNS.split())
    assert not {*NAMES.split(), *SURNAMES.split()} & {*haystack.ADJECTIVES.split(), *haystack.NOUNS.split()}
    for wording in (text for pair in WORDINGS for text in pair):
        assert "magic" not in wording
        assert "mentioned" not in wording
    facts = [draw_fact(random.Random(i)) for i in range(400)]
    assert all(f.key in f.statement and f.key in f.question and f.value in f.question for f in facts)
    forms = {"number": r"[a-z]+-[a-z]+ \d{7}", "uuid": r"[a-z]+-[a-z]+ [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
    for form in (*forms.values(), r"[A-Z]\w+ [A-Z]\w+ \d{4,8}"):
        assert sum(re.fullmatch(form, f"{f.key} {f.value}") is not None for f in facts) > 60
    assert {len(f.value) for f in facts if "number of" in f.statement and " " in f.key} == {4, 5, 6, 7, 8}
    assert all(uuid.UUID(f.value).version == 4 for f in facts if len(f.value) == 36)


def test_a_run_says_its_share(dataset: TokenDataset, tmp_path: Path) -> None:
    config = recipes.adapt(tiny.config(vocab_size=257), "e2e", context_length=T, batch_size=2)
    assert "recall" not in config.as_dict()
    assert type(training_sampler(config, dataset)) is Sampler
    config = type(config).from_dict(config.as_dict() | {"recall": 0.25})
    drawn = training_sampler(config, dataset).batch(0)
    assert torch.equal(drawn.input_ids, sampler(dataset, 0.25, batch_size=2).batch(0).input_ids)
    with pytest.raises(UserError, match=r"recall is 0\.6; it must be at most 0\.5"):
        type(config).from_dict(config.as_dict() | {"recall": 0.6})
    (tmp_path / "data" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"recall is 0\.25, but .*data has no tokenizer to write facts with"):
        training_sampler(config, TokenDataset.open(tmp_path / "data"))


def test_a_run_trains_on_them(dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    batch = Sampler.batch

    def watched(self: Sampler, *place: int) -> Batch:
        seen.append(batch(self, *place).input_ids)
        return batch(self, *place)

    monkeypatch.setattr(Sampler, "batch", watched)
    network = tiny.config(vocab_size=257, mini_batch_size=512, window_size=16)
    config = recipes.with_steps(recipes.adapt(network, "e2e", context_length=T, batch_size=1), 1)
    train(dataclasses.replace(config, recall=0.25), dataset, tmp_path / "run")
    assert found_facts(TOKENIZER.decode(seen[0][0].tolist()))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["recall"] == 0.25
