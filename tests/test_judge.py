"""Decoding quality: who is judged, on what, by whom; and judgements that would mean nothing are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from longread.checkpoint import save_model
from longread.cli import main
from longread.config import InnerConfig, ModelConfig, UserError
from longread.evaluate import (
    HUMAN,
    Document,
    HuggingFaceJudge,
    Judge,
    LongreadJudge,
    WrittenTexts,
    check_bins,
    check_judge,
    decoding_notes,
    judges as judges_module,
    prompts,
    verdicts,
    write,
)
from longread.model import Transformer, initialize
from longread.session import Sampling, Session
from longread.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_bpe

INNER = InnerConfig(lr=0.7, clip=0.5)
GREEDY, DRAWN = Sampling(temperature=0), Sampling(top_p=0.95, repetition_penalty=1.1)
TEXTS = [" ".join(f"Part {i} of text {k} counts {i * i % 89}." for i in range(80)) for k in range(3)]
BPE = train_bpe(TEXTS, 320)
BYTES = ByteTokenizer()
T = 96


def model(suffix: int = 1, vocab_size: int = 257, seed: int = 1) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=16,
        mini_batch_size=8,
        num_suffix_blocks=suffix,
    )
    made = Transformer(config).double()
    initialize(made, seed=seed)
    return made.requires_grad_(False)


def documents(tokenizer: Tokenizer = BYTES) -> list[Document]:
    return [
        Document(f"text {k}", np.array([tokenizer.bos_id, *tokenizer.encode(text)])) for k, text in enumerate(TEXTS)
    ]


def judge(tokenizer: Tokenizer = BYTES) -> LongreadJudge:
    return LongreadJudge("judge", model(vocab_size=tokenizer.vocab_size, seed=2), INNER, tokenizer, "judge's")


@pytest.fixture(scope="module")
def writings() -> list[WrittenTexts]:
    human = prompts(documents(), T)
    writer = model(vocab_size=260)
    written = write("w", writer, INNER, BYTES, human, learn=True, sampling=DRAWN, seed=5, batch_size=2)
    return [WrittenTexts(HUMAN, "human", human), written]


def test_continuations_keep_the_prompt_and_are_repeatable(writings: list[WrittenTexts]) -> None:
    human, written = writings[0].tokens, writings[1].tokens
    assert written.shape == human.shape == (3, T)
    assert (written[:, : T // 2] == human[:, : T // 2]).all()
    assert (written[:, T // 2 :] != human[:, T // 2 :]).any()
    assert written[:, T // 2 :].max() < 256  # no BOS, and nothing that the tokenizer does not know
    again = write("w", model(vocab_size=260), INNER, BYTES, human, learn=True, sampling=DRAWN, seed=5)
    assert (again.tokens == written).all()  # side by side or not
    other = write("w", model(vocab_size=260), INNER, BYTES, human, learn=True, sampling=DRAWN, seed=6)
    assert (other.tokens != written).any()


def test_learning_and_frozen_continuations_are_those_of_a_session() -> None:
    human, writer = prompts(documents(), T), model()
    for learn in (True, False):
        found = write("w", writer, INNER, BYTES, human, learn=learn, sampling=GREEDY)
        assert found.reading == ("learning" if learn else "frozen")
        session = Session(writer, INNER, learn=learn)
        session.read(human[1, : T // 2])
        expected = list(session.generate(T // 2, temperature=0))
        if 256 not in expected:
            assert found.tokens[1, T // 2 :].tolist() == expected
    assert write("s", model(suffix=0), INNER, BYTES, human, learn=True, sampling=GREEDY).reading == "static"


def test_a_judge_of_the_same_tokens_scores_them_exactly(writings: list[WrittenTexts]) -> None:
    found = verdicts(judge(), BYTES, writings, bins=4, batch_size=2)
    alone = [Session(judge()._model, INNER).read(row) for row in writings[1].tokens]
    expected = torch.stack(alone)[:, T // 2 :].mean()
    assert found[1].continuation.nats_per_token.mean == pytest.approx(expected.item())
    assert [(b.start, b.end) for b in found[1].by_position] == [(0, 24), (24, 48), (48, 72), (72, 96)]
    third = torch.stack(alone)[:, 48:72].mean()
    assert found[1].by_position[2].score.nats_per_token.mean == pytest.approx(third.item())
    first = torch.stack(alone)[:, 1:24].mean()  # nothing predicts the first token of all
    assert found[1].by_position[0].score.nats_per_token.mean == pytest.approx(first.item())
    # human text: a byte a token; the prompts are the same
    human = found[0].continuation
    assert human.bits_per_byte is not None
    assert human.bits_per_byte.mean == pytest.approx(human.nats_per_token.mean / math.log(2))
    assert found[0].prompt == found[1].prompt
    assert found[0].above_human is None
    assert found[1].above_human is not None
    assert found[1].above_human.n == 3


class Counting(Judge):
    """Gives each token as many nats as its own bytes: a nat a byte, whatever the tokenizer."""

    context_limit = 500
    name, fingerprint = "counting", "counting"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def nll(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in tokens.tolist():
            ids, lengths = self.tokenizer.encode_with_bytes(self.tokenizer.decode(row))
            assert [self.tokenizer.bos_id, *ids] == row
            rows.append([math.nan, *map(float, lengths)])
        return torch.tensor(rows, dtype=torch.float64)


def test_a_judge_with_another_tokenizer_reads_the_text() -> None:
    human = prompts(documents(), T)
    counting = Counting(BPE)
    check_judge(counting, BYTES, human, [("w", "w's")])
    (verdict,) = verdicts(counting, BYTES, [WrittenTexts(HUMAN, "human", human)], bins=4)
    for place in (verdict.prompt, verdict.continuation, *(b.score for b in verdict.by_position)):
        assert place.bits_per_byte is not None
        assert place.bits_per_byte.mean == pytest.approx(1 / math.log(2))
    tokens = [BPE.encode(BYTES.decode(row)) for row in human.tolist()]
    halves = [(verdict.prompt, 0), (verdict.continuation, 1)]
    whole = sum(map(len, tokens))
    per_token = sum(score.nats_per_token.mean for score, _ in halves)
    assert per_token > 2  # tokens of several bytes
    assert whole < 3 * (T - 1)
    notes = decoding_notes([WrittenTexts(HUMAN, "human", human)], BYTES, counting)
    assert "counting has a tokenizer of its own" in notes[0]
    broken = human.copy()
    broken[:, T // 2 :: 5] = 0xFF
    assert "are not valid UTF-8" in decoding_notes([WrittenTexts("w", "static", broken)], BYTES, counting)[1]


def test_repetition_is_counted() -> None:
    rows = np.stack([np.arange(T), np.concatenate([np.arange(T // 2), np.full(T // 2, 7)])]) % 200
    (verdict,) = verdicts(judge(), BYTES, [WrittenTexts("w", "static", rows)], bins=2)
    windows = T // 2 - 7
    assert verdict.repeated is not None
    assert verdict.repeated.mean == pytest.approx((windows - 1) / (2 * windows))


def lossy() -> HuggingFaceTokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "part": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return HuggingFaceTokenizer(made)


def test_judgements_that_would_mean_nothing_are_refused() -> None:
    human = prompts(documents(), T)
    with pytest.raises(UserError, match="the judge judge is the writer w; a model likes what it writes"):
        check_judge(judge(), BYTES, human, [("v", "v's"), ("w", "judge's")])
    with pytest.raises(UserError, match="the tokenizer of the judge counting does not give back the documents"):
        check_judge(Counting(lossy()), BYTES, human, [])
    small = Counting(BPE)
    small.context_limit = 20
    with pytest.raises(UserError, match="reads at most 20 tokens and the documents take"):
        check_judge(small, BYTES, human, [])
    with pytest.raises(UserError, match="text 0 has 5 tokens; --context asks for 96"):
        prompts([Document("text 0", np.arange(5))], T)
    with pytest.raises(UserError, match="--bins 3 has no border behind the 48 of 96 tokens that are read; give 2, or"):
        verdicts(judge(), BYTES, [WrittenTexts(HUMAN, "human", human)], bins=3)


def test_less_than_half_may_be_written(writings: list[WrittenTexts]) -> None:
    """What is read is the document's, what is written the session's, and only that is judged as the continuation."""
    human = prompts(documents(), T)
    few = write("w", model(), INNER, BYTES, human, learn=True, sampling=GREEDY, written=24)
    assert (few.prompt_tokens, few.tokens.shape) == (72, (3, T))
    assert (few.tokens[:, :72] == human[:, :72]).all()
    session = Session(model(), INNER)
    session.read(human[1, :72])
    expected = list(session.generate(24, temperature=0))
    assert 256 in expected or few.tokens[1, 72:].tolist() == expected
    by_human = WrittenTexts(HUMAN, "human", human, written=24)
    of_human, of_model = verdicts(judge(), BYTES, [by_human, few], bins=4)
    losses = torch.stack([Session(judge()._model, INNER).read(row) for row in few.tokens])
    assert of_model.continuation.nats_per_token.mean == pytest.approx(losses[:, 72:].mean().item())
    assert of_model.prompt == of_human.prompt
    last = of_model.by_position[-1]
    assert (last.start, last.end, last.score) == (72, 96, of_model.continuation)
    for bins in (6, 2):
        with pytest.raises(UserError, match=f"--bins {bins} has no border behind the 72 .* give 4, or read another"):
            verdicts(judge(), BYTES, [few], bins=bins)
    with pytest.raises(UserError, match="behind the 1950 of 2048 tokens that are read; give 1024, or"):
        check_bins(8, 1950, 2048)
    check_bins(1024, 1950, 2048)


def test_writers_that_diverge_are_said() -> None:
    human = prompts(documents(), T)
    lost = write("w", model(), InnerConfig(lr=1e300, clip=None), BYTES, human, learn=True, sampling=DRAWN)
    assert lost.diverged_at == [T // 2] * 3
    assert "w, learning: 3 of 3 readings were no longer finite" in decoding_notes([lost], BYTES, judge())[0]


class FakeCausalLM(torch.nn.Module):
    """What `transformers` gives, as far as a judge uses it: logits that depend on the token before and on the past."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(max_position_embeddings=4096, vocab_size=vocab_size)
        self.table = torch.nn.Parameter(torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: torch.Tensor, past_key_values: torch.Tensor | None, use_cache: bool) -> object:
        assert use_cache
        before = 0 if past_key_values is None else past_key_values
        seen = before + torch.ones_like(input_ids).cumsum(1)
        logits = self.table[input_ids] * (1 + 0.01 * seen[..., None])
        return types.SimpleNamespace(logits=logits, past_key_values=before + input_ids.shape[1])


def hugging_face(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "fake"}))
    BPE.save(directory)

    class AutoModelForCausalLM:
        @staticmethod
        def from_pretrained(path: str, *, local_files_only: bool, dtype: torch.dtype) -> FakeCausalLM:
            assert local_files_only
            if "broken" in path:
                raise OSError("no file named model.safetensors.\nmore")
            return FakeCausalLM(BPE.vocab_size).to(dtype)

    fake = types.ModuleType("transformers")
    fake.AutoModelForCausalLM = AutoModelForCausalLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return directory


def test_a_hugging_face_judge_reads_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = HuggingFaceJudge(hugging_face(tmp_path / "hf", monkeypatch), torch.device("cpu"))
    tokens = torch.randint(BPE.vocab_size, (2, 50))
    whole = found.nll(tokens)
    monkeypatch.setattr(judges_module, "PIECE", 7)
    torch.testing.assert_close(found.nll(tokens), whole, equal_nan=True)
    assert whole[:, 0].isnan().all()
    logits = found._model(input_ids=tokens, past_key_values=None, use_cache=True).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(whole[:, 1:].flatten().float(), expected)
    assert found.nll(tokens[:, :1]).shape == (2, 1)


def stored(directory: Path, suffix: int = 1, tokenizer: Tokenizer = BYTES, seed: int = 1) -> Path:
    made = model(suffix, tokenizer.vocab_size, seed).float()
    save_model(directory, made, INNER, tokenizer_fingerprint=tokenizer.fingerprint)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for k, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{k}.txt").write_text(text)
    stored(tmp_path / "e2e")
    stored(tmp_path / "swa", suffix=0)
    stored(tmp_path / "judge", seed=3)
    stored(tmp_path / "bpe", tokenizer=BPE)
    return tmp_path


def judged(home: Path, *arguments: object) -> int:
    options = ["judge", *arguments, "--data", home / "texts", "--device", "cpu", "--documents", 2]
    return main([str(a) for a in options])


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = ["--json", home / "j.json", "--plots", home / "plots", "--report", home / "j.html"]
    assert judged(home, home / "e2e", home / "swa", "--judge", home / "judge", "--context", 64, *outputs) == 0
    out = capsys.readouterr().out
    assert "2 continuations of 32 tokens after 32, judged by judge" in out
    figures = json.loads((home / "j.json").read_text())
    assert [v["reading"] for v in figures["verdicts"]] == ["human", "learning", "frozen", "static"]
    assert figures["sampling"] == {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1}
    assert figures["same_tokenizer"]
    assert (home / "plots" / "judged_loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (home / "j.html").read_text()
    other = hugging_face(home / "hf", monkeypatch)
    assert judged(home, home / "e2e", "--judge", other, "--context", 64, "--no-control", "--json", home / "h.json") == 0
    figures = json.loads((home / "h.json").read_text())
    assert not figures["same_tokenizer"]
    assert "hf has a tokenizer of its own" in figures["notes"][0]


def test_a_judge_with_full_attention_has_the_context_of_its_training(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(model(suffix=0).config, attention="full")
    facts = {"run": "twin", "adapted_from": {"model": "a", "provenance": {"context": 60}}}
    origins = {"original": {"context": 60}, "twin": facts, "windowed": facts, "new": {}}
    origins |= {"run": {"context_length": 60}, "extended": facts | {"context_length": 64}}
    for name, provenance in origins.items():
        network = model(suffix=0) if name == "windowed" else Transformer(config)
        save_model(home / name, network, INNER, BYTES.fingerprint, provenance)
        BYTES.save(home / name)
    for name in ("original", "twin", "run"):
        assert judged(home, home / "e2e", "--judge", home / name, "--context", 64) == 2
        assert f"the judge {name} reads at most 60 tokens and the documents take 64" in capsys.readouterr().err
    for name in ("windowed", "new", "extended"):
        assert judged(home, home / "e2e", "--judge", home / name, "--context", 64) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["e2e", "--judge", "e2e"], "the judge e2e is the writer e2e"),
        (["e2e", "bpe", "--judge", "judge"], "has another tokenizer than"),
        (["e2e", "--judge", "judge", "--context", "99992"], "no document has 99992 tokens; lower --context or"),
        (["e2e", "--judge", "judge", "--context", "100"], "--context 100 does not divide into --bins 8"),
        (
            ["e2e", "--judge", "judge", "--context", "64", "--written", "64"],
            "--written 64 leaves nothing of --context 64",
        ),
        (
            ["e2e", "--judge", "judge", "--context", "64", "--written", "4"],
            "--bins 8 has no border behind the 60 of 64",
        ),
        (["e2e", "--judge", "judge", "--top-p", "0"], "top_p is 0.0"),
        (["e2e", "--judge", "judge", "--temperature", "nan"], "temperature is nan"),
        (["e2e", "--judge", "nothing"], "there is no model at"),
        (["e2e", "--judge", "broken"], "holds no causal language model that transformers can open: no file named"),
    ],
)
def test_commands_that_cannot_begin(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    reason: str,
) -> None:
    hugging_face(home / "broken", monkeypatch)
    names = {"e2e", "bpe", "judge", "nothing", "broken"}
    assert judged(home, *(home / a if a in names else a for a in arguments), "--json", home / "x.json") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longread: error: ")]
    assert len(errors) == 1
    assert reason in errors[0]
    assert not (home / "x.json").exists()


def test_a_missing_extra_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = hugging_face(home / "hf", monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert judged(home, home / "e2e", "--judge", other) == 2
    assert "run pip install transformers accelerate," in capsys.readouterr().err
