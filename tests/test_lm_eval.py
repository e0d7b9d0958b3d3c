"""Readers in lm-evaluation-harness: every request is scored as a session of its own does it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from longread.config import UserError
from longread.loading import OpenModel, open_model
from longread.tokenizer import ByteTokenizer, HuggingFaceTokenizer, train_bpe
from tests.lm_eval_readers import DOCUMENTS, TEXT, M, asked, directly, harness_model, save


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), ByteTokenizer())


@pytest.fixture(scope="module")
def opened(directory: Path) -> OpenModel:
    return open_model(directory, "cpu")


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = train_bpe([TEXT], 300)._tokenizer
    return save(tmp_path_factory.mktemp("without-bos"), HuggingFaceTokenizer(raw, has_bos=False))


PAIRS = [
    (TEXT[:n], continuation)
    for n in (1, M - 2, M - 1, M, 100)
    for continuation in (" and", "xyz", TEXT[n : n + 2 * M + 1])
]


@pytest.mark.parametrize("learn", [True, False])
def test_likelihoods_are_those_of_a_session_to_the_last_digit(directory: Path, opened: OpenModel, learn: bool) -> None:
    found = harness_model(directory, learn=learn).loglikelihood(asked(PAIRS), disable_tqdm=True)
    bos = opened.tokenizer.beginning
    for (context, continuation), (log_likelihood, _) in zip(PAIRS, found, strict=True):
        spaces = len(context) - len(context.rstrip())  # these count for the continuation
        ids = opened.tokenizer.encode(context + continuation)
        begins = len(opened.tokenizer.encode(context)) - spaces
        assert log_likelihood == directly(opened, [*bos, *ids[:begins]], ids[begins:], learn)


def test_greedy_is_what_a_session_would_write(directory: Path, opened: OpenModel) -> None:
    from longread.lm_eval.scoring import BatchReader, score

    context, pairs = (256, *TEXT[:50].encode()), []
    session = opened.session()
    session.read(context)
    written = list(session.generate(2 * M + 3, temperature=0))
    for n in (1, M, len(written)):
        pairs += [(context, tuple(written[:n])), (context, (*written[: n - 1], (written[n - 1] + 1) % 257))]
    reader = BatchReader(opened.model, opened.inner, learn=True)
    found = dict(score(reader, pairs, batch_size=4))
    assert [found[i].is_greedy for i in range(len(pairs))] == [True, False] * 3
    frozen = dict(score(BatchReader(opened.model, opened.inner, learn=False), pairs, batch_size=4))
    assert not frozen[4].is_greedy  # other weights would write something else


def test_a_batch_gives_what_single_requests_give(directory: Path, tmp_path: Path) -> None:
    pairs = [(TEXT[i : i + 60], TEXT[i + 60 : i + 64 + i % 2]) for i in range(0, 40, 4)]
    alone, together = (
        harness_model(directory, batch_size=n).loglikelihood(asked(pairs), disable_tqdm=True) for n in (1, 7)
    )
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], rel=1e-13)
    alone, together = (
        harness_model(directory, batch_size=n, dtype="float32").loglikelihood(asked(pairs), disable_tqdm=True)
        for n in (1, 7)
    )
    assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_requests_know_nothing_of_each_other(directory: Path, batch_size: int) -> None:
    model = harness_model(directory, batch_size=batch_size)
    pairs = PAIRS + PAIRS[:4]
    shuffled = random.Random(0).sample(range(len(pairs)), len(pairs))
    found = model.loglikelihood(asked(pairs), disable_tqdm=True)
    again = model.loglikelihood(asked([pairs[i] for i in shuffled]), disable_tqdm=True)
    assert [again[shuffled.index(i)] for i in range(len(pairs))] == found
    wishes = [(TEXT[: 20 + i % 3], {"until": ["q"], "max_gen_toks": 12, "temperature": 0.8}) for i in range(6)]
    written = model.generate_until(asked(wishes), disable_tqdm=True)
    model.loglikelihood_rolling(asked([(TEXT,)]), disable_tqdm=True)
    assert model.generate_until(asked(wishes), disable_tqdm=True) == written


def test_a_shared_context_is_read_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longread.lm_eval import scoring

    read, tokens = scoring.read, []
    monkeypatch.setattr(
        scoring, "read", lambda *args, **options: tokens.append(args[2].numel()) or read(*args, **options)
    )
    pairs = [("x" * 99, f" {choice}") for choice in "ABCD"]
    harness_model(directory).loglikelihood(asked(pairs), disable_tqdm=True)
    assert sorted(tokens) == [2, 2, 2, 2, 100]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_reader_that_learning_has_broken_is_rescued_as_a_session_is(
    directory: Path, opened: OpenModel, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    pairs = [(TEXT[i : i + 50] + ".", "abc") for i in range(3)]
    model = harness_model(directory, batch_size=batch_size)
    unharmed = model.loglikelihood(asked(pairs))
    rule = sys.modules["longread.inner_loop.reading"]
    monkeypatch.setattr(rule, "MARGIN", -10.0)  # every reader counts as broken
    found = model.loglikelihood(asked(pairs))
    expected = [directly(opened, [256, *context.encode()], [*b"abc"]) for context, _ in pairs]
    assert [x for x, _ in found] == pytest.approx(expected, rel=1e-13)
    assert all(abs(x - y) > 1e-6 for (x, _), (y, _) in zip(found, unharmed, strict=True))


def test_a_model_that_is_read_frozen_by_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = OpenModel.session
    monkeypatch.setattr(OpenModel, "session", lambda self, learn=False: session(self, learn=learn))
    assert not harness_model(directory).learn
    assert "is read frozen, as it says itself; learn=true learns" in caplog.text
    assert harness_model(directory, learn="true").learn


def test_learning_helps_where_a_prompt_repeats_itself(directory: Path) -> None:
    pair = [("abcdefghijklmnopqrstuvwxyz" * 12, "abcdefgh")]
    learned, frozen = (
        harness_model(directory, learn=learn).loglikelihood(asked(pair))[0][0] for learn in (True, False)
    )
    assert learned > frozen + 0.5
    short = [("abc", "de")]  # no mini-batch is complete
    learned, frozen = (
        harness_model(directory, learn=learn).loglikelihood(asked(short))[0][0] for learn in (True, False)
    )
    assert learned == pytest.approx(frozen, rel=1e-13)


def test_documents_are_read_as_longread_reads_them(directory: Path, opened: OpenModel) -> None:
    found = harness_model(directory).loglikelihood_rolling(asked([(text,) for text in [*DOCUMENTS, ""]]))
    assert found[-1] == 0
    assert found[:-1] == [-opened.session().read(text).double().sum().item() for text in DOCUMENTS]


def test_nothing_predicts_the_first_token_where_the_tokenizer_has_no_bos(without_bos: Path) -> None:
    opened = open_model(without_bos, "cpu")
    assert opened.tokenizer.bos_id is None
    ids = opened.tokenizer.encode(TEXT)
    model = harness_model(without_bos)
    assert model.prefix_token_id is None
    assert model.eot_token_id is None
    losses = opened.session().read(ids).double()
    assert losses[0].isnan()
    assert model.loglikelihood_rolling(asked([(TEXT,)])) == [-losses[1:].sum().item()]
    short = TEXT[:20]
    own = opened.tokenizer.encode(short)
    (scored, _), (single, greedy) = model.loglikelihood(asked([("", short), ("", "T")]))
    assert scored == pytest.approx(-opened.session().read(own)[1:].double().sum().item(), rel=1e-13)
    assert (single, greedy) == (0, True)
    with pytest.raises(UserError, match="give prefix_token_id"):
        model.generate_until(asked([("", {"until": ["\n"]})]))

    prefixed = harness_model(without_bos, prefix_token_id=3)
    assert prefixed.loglikelihood_rolling(asked([(TEXT,)])) == [
        -opened.session().read([3, *ids])[1:].double().sum().item()
    ]
    assert prefixed.loglikelihood(asked([("", short)]))[0][0] == directly(opened, [3], own)
    assert prefixed.loglikelihood(asked([("A", "B")])) == model.loglikelihood(asked([("A", "B")]))
    prefixed.generate_until(asked([("", {"until": ["\n"], "max_gen_toks": 2})]))


def test_a_converted_model_has_the_scores_of_its_source(tmp_path: Path) -> None:
    """Against the harness's own model "hf": frozen, and shorter than the window, both are the same network."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from tests import pretrained_models

    source = pretrained_models.make("llama")
    pretrained_models.save(source, tmp_path / "source")
    pretrained_models.converted(tmp_path / "source", tmp_path / "reader", "--window", "64", "--mini-batch", "16")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pretrained_models.tokenizer(), eos_token="~", pad_token="~")
    theirs = HFLM(pretrained=source, tokenizer=tokenizer, device="cpu", max_length=256)
    ours = harness_model(tmp_path / "reader", prefix_token_id=tokenizer.eos_token_id)
    pairs = asked([("the lamp and the", " keeper"), ("a lamp ", "burns"), ("", "lamp")])
    expected = [score for score, _ in theirs.loglikelihood(pairs, disable_tqdm=True)]
    assert [score for score, _ in ours.loglikelihood(pairs, disable_tqdm=True)] == pytest.approx(expected, rel=1e-5)
    document = asked([("the keeper trims the lamp",)])
    expected = theirs.loglikelihood_rolling(document, disable_tqdm=True)
    assert ours.loglikelihood_rolling(document, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)
    wish = asked([("the lamp", {"until": ["q"], "max_gen_toks": 20, "do_sample": False})])
    assert ours.generate_until(wish, disable_tqdm=True) == theirs.generate_until(wish, disable_tqdm=True)
