"""Needles: prompts that are what they say, answers scored as RULER scores them, and models that could not fail."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longread.checkpoint import save_model
from longread.cli import main
from longread.config import InnerConfig, ModelConfig, UserError
from longread.evaluate import (
    VARIANTS,
    Needles,
    accuracies,
    continue_texts,
    essays,
    make_samples,
    mcnemar,
    needle,
    needle_figures,
    noise,
    search,
    wilson,
)
from longread.evaluate.continuation import BatchContinuation
from longread.evaluate.haystack import NOISE
from longread.model import Transformer, initialize
from longread.session import Sampling, Session
from longread.tokenizer import ByteTokenizer, Tokenizer, train_bpe

INNER = InnerConfig(lr=0.7, clip=0.5)
ESSAY = " ".join(f"Chapter {i} is about {i * i % 97} things\nand “people”. Was it so? Yes!" for i in range(300))
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": train_bpe([ESSAY, NOISE], 400)}


def model(suffix: int = 1, vocab_size: int = 257, window: int = 16) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=window,
        mini_batch_size=8,
        num_suffix_blocks=suffix,
    )
    made = Transformer(config).double()
    initialize(made, seed=1)
    return made.requires_grad_(False)


@pytest.mark.parametrize("number", VARIANTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_are_exact(number: int, name: str) -> None:
    """Every prompt has its length to the token, one needle at its depth, and asks for the needle's own key."""
    tokenizer, variant = TOKENIZERS[name], VARIANTS[number]
    T = 700
    haystack = noise(tokenizer, T) if number == 1 else essays([ESSAY], tokenizer, T)
    samples = make_samples(tokenizer, variant, haystack, T, [0.0, 0.5, 1.0], 4, seed=3)
    assert len({sample.value for sample in samples}) == 12
    for sample in samples:
        assert len(sample.tokens) == T
        assert sample.tokens[0] == tokenizer.bos_id
        text = tokenizer.decode(sample.tokens)
        kind = "uuid" if number == 3 else "number"
        assert text.startswith(f"A special magic {kind} is hidden within the following text. Make sure to memorize it.")
        assert text.endswith(f" The special magic {kind} for {sample.key} mentioned in the provided text is")
        needle = f"One of the special magic {kind}s for {sample.key} is: {sample.value}."
        assert text.count(sample.value) == text.count(needle) == 1
        assert tokenizer.decode(sample.tokens[sample.needle_start : sample.needle_end]).strip() == needle
        assert re.fullmatch(r"[a-z]+-[a-z]+", sample.key)
        if number == 3:
            assert str(uuid.UUID(sample.value)) == sample.value
        else:
            assert re.fullmatch(r"[1-9]\d{6}", sample.value)
        # between two sentences, or at an end of the haystack
        before = text[: text.index(needle)].rstrip()
        assert before.endswith((".", "?", "!", "”"))
        assert ("\n" if number == 1 else " ") == text[text.index(needle) - 1] or sample.depth == 0
    starts = {depth: [s.needle_start for s in samples if s.depth == depth] for depth in (0.0, 0.5, 1.0)}
    head = len(tokenizer.encode(text[: text.index("afterwards.") + 11])) + 3
    assert max(starts[0.0]) <= head + 5
    assert all(abs(start - T / 2) < 160 for start in starts[0.5])
    assert min(starts[1.0]) > max(starts[0.5])


@pytest.mark.parametrize("number", VARIANTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_verbatim_probe_repeats_the_needle_up_to_its_value(number: int, name: str) -> None:
    """The keys and values of the question, so that the two can be compared prompt by prompt."""
    tokenizer, variant = TOKENIZERS[name], VARIANTS[number]
    haystack = noise(tokenizer, 700) if number == 1 else essays([ESSAY], tokenizer, 700)
    asked = make_samples(tokenizer, variant, haystack, 700, [0.0, 0.5], 3, seed=3)
    for sample, question in zip(
        make_samples(tokenizer, variant, haystack, 700, [0.0, 0.5], 3, seed=3, probe="verbatim"), asked, strict=True
    ):
        assert (sample.key, sample.value, sample.depth) == (question.key, question.value, question.depth)
        assert (sample.probe, question.probe) == ("verbatim", "question")
        assert sample.context_length == 700
        text = tokenizer.decode(sample.tokens)
        repeated = f"One of the special magic {variant.value}s for {sample.key} is:"
        assert text.endswith(("\n" if number == 1 else " ") + repeated)
        assert text.count(f"{repeated} {sample.value}.") == text.count(sample.value) == 1
        assert "What is the special magic" not in text


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    tokenizer = TOKENIZERS["bpe"]
    haystack = essays([ESSAY], tokenizer, 600)
    few = make_samples(tokenizer, VARIANTS[2], haystack, 600, [0.5], 2, seed=0)
    many = make_samples(tokenizer, VARIANTS[2], haystack, 600, [0.0, 0.5], 5, seed=0)
    other = make_samples(tokenizer, VARIANTS[2], haystack, 600, [0.5], 2, seed=1)
    assert [s.tokens.tolist() for s in few] == [s.tokens.tolist() for s in many[5:7]]
    assert few[0].value != other[0].value


def test_noise_is_rulers() -> None:
    tokens = noise(TOKENIZERS["bytes"], 200).tokens
    assert TOKENIZERS["bytes"].decode(tokens).startswith(f"\n{NOISE}\n{NOISE}")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("longest", [1, 90, 1000])
def test_noise_of_any_length_is_made_from_four_lines(name: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and gaps are those of the whole text, of which no more than four lines are encoded."""
    tokenizer, encoded = TOKENIZERS[name], []
    for method in ("encode", "encode_with_bytes"):
        real = getattr(tokenizer, method)

        def noting(text: str, real: Callable[[str], object] = real) -> object:
            encoded.append(len(text))
            return real(text)

        monkeypatch.setattr(tokenizer, method, noting)
    made = noise(tokenizer, longest)
    assert max(encoded) == 4 * len(f"\n{NOISE}")
    monkeypatch.undo()
    assert len(made.tokens) >= longest
    text = tokenizer.decode(made.tokens)
    assert text == f"\n{NOISE}" * (len(text) // len(f"\n{NOISE}"))
    assert made.tokens.tolist() == tokenizer.encode(text)
    ends = [0, *(len(tokenizer.encode(text[: match.end()])) for match in re.finditer(r"\.(?=\n|$)", text))]
    assert made.gaps.tolist() == ends


def test_haystacks_too_short_are_refused_or_repeated() -> None:
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(UserError, match="the haystack has 23 tokens, fewer than the context of 500; give more text"):
        essays(["Two words. Three more."], tokenizer, 500)
    repeated = essays(["Two words. Three more."], tokenizer, 500, repeat=True)
    assert 500 <= len(repeated.tokens) < 530
    assert len(make_samples(tokenizer, VARIANTS[2], repeated, 500, [0.3], 1, seed=0)[0].tokens) == 500
    for nothing in ([], [" \n "]):
        with pytest.raises(UserError, match="the haystack holds no words"):
            essays(nothing, tokenizer, 500, repeat=True)


def test_a_needle_longer_than_the_context_is_refused() -> None:
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(UserError, match=r"a context of 100 tokens is too short for the needle: .* take 3"):
        make_samples(tokenizer, VARIANTS[1], noise(tokenizer, 100), 100, [0.5], 1, seed=0)


@pytest.mark.parametrize("learn", [True, False])
def test_many_are_continued_as_each_alone(learn: bool) -> None:
    reader = model()
    prompts = torch.randint(257, (3, 21))
    sampling = Sampling(max_tokens=30, temperature=0, repetition_penalty=1.3)
    together = continue_texts(reader, INNER, prompts, sampling, learn=learn)
    for prompt, found in zip(prompts, together.tokens, strict=True):
        session = Session(reader, INNER, learn=learn)
        session.read(prompt)
        assert list(session.generate(30, temperature=0, repetition_penalty=1.3)) == found.tolist()
    assert together.diverged_at == [None] * 3


def test_a_draw_depends_on_its_own_seed_alone() -> None:
    """And it is what a session draws with that seed."""
    reader, prompts = model(), torch.randint(257, (3, 9))
    sampling = Sampling(max_tokens=20, top_p=0.9, repetition_penalty=1.1)
    all_three = continue_texts(reader, INNER, prompts, sampling, learn=True, seeds=[1, 2, 3]).tokens
    last = continue_texts(reader, INNER, prompts[2:], sampling, learn=True, seeds=[3]).tokens
    again = continue_texts(reader, INNER, prompts[2:], sampling, learn=True, seeds=[4]).tokens
    assert torch.equal(all_three[2:], last)
    session = Session(reader, INNER)
    session.read(prompts[2])
    assert list(session.generate(20, top_p=0.9, repetition_penalty=1.1, seed=3)) == last[0].tolist()
    assert not torch.equal(again, last)


def test_what_is_forbidden_is_never_written_and_enough_is_enough() -> None:
    reader, prompts = model(), torch.randint(257, (2, 5))
    sampling = Sampling(max_tokens=64, temperature=0)
    free = continue_texts(reader, INNER, prompts, sampling, learn=False).tokens
    banned = sorted(set(free.flatten().tolist()))
    bound = continue_texts(reader, INNER, prompts, sampling, learn=False, forbidden=banned).tokens
    assert not set(bound.flatten().tolist()) & set(banned)
    short = continue_texts(reader, INNER, prompts, sampling, learn=False, enough=lambda written: written.shape[1] >= 20)
    assert short.tokens.shape[1] == 32
    assert torch.equal(short.tokens, free[:, :32])


def test_the_probe_is_scored_and_forgotten() -> None:
    reader, prompts, probe = model(), torch.randint(257, (2, 20)), torch.randint(257, (2, 6))
    sampling = Sampling(max_tokens=10, temperature=0)
    plain = continue_texts(reader, INNER, prompts, sampling, learn=True)
    probed = continue_texts(reader, INNER, prompts, sampling, learn=True, probe=probe)
    assert torch.equal(plain.tokens, probed.tokens)
    session = Session(reader, INNER)
    session.read(prompts[1])
    session.learn = False
    assert probed.probe_nll is not None
    torch.testing.assert_close(probed.probe_nll[1], session.read(probe[1]))


@pytest.mark.parametrize(
    ("found", "n", "low", "high"), [(0, 20, 0.0, 0.161), (20, 20, 0.839, 1.0), (5, 10, 0.237, 0.763), (1, 1, 0.207, 1)]
)
def test_wilson_intervals(found: int, n: int, low: float, high: float) -> None:
    """Against the tabulated values of the formula."""
    share = wilson(found, n)
    assert share is not None
    assert (share.mean, share.n) == (found / n, n)
    assert (share.low, share.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert wilson(0, 0) is None


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ("", "", 1.0),
        ("1100", "1100", 1.0),
        ("1111110", "0000001", 2 * (1 + 7) / 2**7),  # 6 against 1
        ("0000001", "1111110", 2 * (1 + 7) / 2**7),
        ("10", "01", 1.0),
        ("1" * 10 + "0" * 50, "0" * 60, 2 / 2**10),
        ("1" * 10 + "01" * 20, "0" * 10 + "01" * 20, 2 / 2**10),  # what both have or lack says nothing
    ],
)
def test_mcnemar_counts_the_prompts_on_which_two_differ(first: str, second: str, p: float) -> None:
    assert mcnemar([x == "1" for x in first], [x == "1" for x in second]) == pytest.approx(p)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])


def trained_to_copy(window: int, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """A model whose decoder is replaced by one that repeats the needle's value when it lies within the window."""
    reader = model(vocab_size=300, window=window)

    class Decoder:
        def __init__(self, model: Transformer, state: object, inner: InnerConfig, *, learn: bool) -> None:
            self.step = 0

        def logits(self) -> torch.Tensor:
            out = torch.zeros(len(PROMPTS[-1]), 300)
            for row, prompt in enumerate(PROMPTS[-1].tolist()):
                text = bytes(i for i in prompt[-window:] if i < 256).decode(errors="replace")
                said = re.search(r"magic number is: (\d+)|numbers for \S+ is: (\d+)\.", text)
                answer = f" {said[2]}. Right." if said else " nothing at all."
                out[row, answer.encode()[min(self.step, len(answer) - 1)]] = 9.0
            out[:, 299] = 99.0  # no token of the tokenizer: must never be written
            return out

        def read(self, tokens: torch.Tensor) -> None:
            self.step += 1

        def rest(self) -> None:
            pass

    monkeypatch.setattr("longread.evaluate.continuation.Decoder", Decoder)
    return reader


PROMPTS: list[torch.Tensor] = []


def test_accuracy_is_split_by_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that copies from its window and knows nothing else scores 1 inside and 0 outside."""
    T, K = 600, 300
    reader, tokenizer = trained_to_copy(K, monkeypatch), ByteTokenizer()
    real = continue_texts

    def noting(
        model: Transformer, inner: InnerConfig, prompts: torch.Tensor, *args: object, **kwargs: object
    ) -> object:
        PROMPTS.append(prompts)
        return real(model, inner, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("longread.evaluate.needle.continue_texts", noting)
    samples = make_samples(tokenizer, VARIANTS[1], noise(tokenizer, T), T, [0.0, 0.5, 1.0], 3, seed=0)
    done: list[int] = []
    result = search(
        "copy", reader, INNER, tokenizer, samples, learn=True, batch_size=2, max_tokens=32, on_samples=done.append
    )
    assert sum(done) == 9
    (score,) = accuracies(result.trials)
    inside = [trial for trial in result.trials if trial.inside_window]
    assert 0 < len(inside) < 9
    assert all(T - s.needle_start <= K for s in samples if s.value in {trial.value for trial in inside})
    assert score.inside_window is not None
    assert score.outside_window is not None
    assert (score.inside_window.mean, score.outside_window.mean) == (1.0, 0.0)
    assert score.all.mean == len(inside) / 9
    assert [depth for depth, _ in score.by_depth] == [0.0, 0.5, 1.0]
    assert all(trial.answer.startswith(" nothing at all.") for trial in result.trials if not trial.found)
    figures = needle_figures(Needles([result]))
    assert "1.00 [" in figures.grids[0].rows[1][1][0]
    assert [chart.name for chart in figures.charts] == ["s_niah_1"]


def test_values_are_scored_as_a_session_scores_them() -> None:
    reader, tokenizer = model(), ByteTokenizer()
    haystack = essays([ESSAY], tokenizer, 600)
    samples = make_samples(tokenizer, VARIANTS[3], haystack, 600, [0.2, 0.9], 1, seed=0)
    samples += make_samples(tokenizer, VARIANTS[2], haystack, 650, [0.5], 1, seed=0)
    result = search("m", reader, INNER, tokenizer, samples, learn=True, max_tokens=4)
    assert result.reading == "learning"
    for sample in samples:
        (trial,) = (t for t in result.trials if t.value == sample.value)
        session = Session(reader, INNER)
        session.read(torch.from_numpy(sample.tokens))
        session.learn = False
        assert trial.value_nats == pytest.approx(session.read(tokenizer.encode(f" {sample.value}")).sum().item())
        assert not trial.found
    assert [(a.variant, a.context_length) for a in accuracies(result.trials)] == [("S-NIAH-2", 650), ("S-NIAH-3", 600)]


def test_a_reading_that_diverges_is_wrong_and_said() -> None:
    tokenizer = ByteTokenizer()
    samples = make_samples(tokenizer, VARIANTS[1], noise(tokenizer, 500), 500, [0.5], 2, seed=0)
    result = search("m", model(), InnerConfig(lr=1e300, clip=None), tokenizer, samples, learn=True, max_tokens=3)
    assert [trial.diverged_at for trial in result.trials] == [500, 500]
    assert not any(trial.found for trial in result.trials)
    assert "m, learning: 2 of 2 readings were no longer finite" in needle_figures(Needles([result])).notes[0]
    assert Needles([result]).as_json()["results"][0]["trials"][0]["value_nats"] is None


def test_what_a_diverged_reading_says_is_no_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are arbitrary, the needle's value among them."""
    tokenizer = ByteTokenizer()
    samples = make_samples(tokenizer, VARIANTS[1], noise(tokenizer, 500), 500, [0.5], 2, seed=0)
    said = torch.tensor([tokenizer.encode(f" {sample.value}") for sample in samples])
    monkeypatch.setattr(needle, "continue_texts", lambda *_, **__: BatchContinuation(said, [None, 507], None))
    result = search("m", model(), INNER, tokenizer, samples, learn=True)
    assert [sample.value in trial.answer for sample, trial in zip(samples, result.trials, strict=True)] == [True, True]
    assert [trial.found for trial in result.trials] == [True, False]
    assert accuracies(result.trials)[0].all == wilson(1, 2)


def stored(directory: Path, tokenizer: Tokenizer, suffix: int = 1) -> Path:
    reader = model(suffix, tokenizer.vocab_size).float()
    save_model(directory, reader, INNER, tokenizer_fingerprint=tokenizer.fingerprint)
    tokenizer.save(directory)
    return directory


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    learning = stored(tmp_path / "e2e", ByteTokenizer())
    static = stored(tmp_path / "swa", TOKENIZERS["bpe"], suffix=0)  # another tokenizer: its own prompts
    (tmp_path / "essay.txt").write_text(ESSAY)
    command = ["needle", learning, static, "--variants", 1, 3, "--haystack", tmp_path / "essay.txt", "--contexts", 512]
    command += ["--depths", 0, 1, "--samples", 2, "--max-tokens", 5, "--json", tmp_path / "n.json"]
    command += ["--probe", "verbatim"]
    command += ["--plots", tmp_path / "plots", "--report", tmp_path / "n.html", "--device", "cpu"]
    assert main([str(a) for a in command]) == 0
    out = capsys.readouterr().out
    assert "S-NIAH-1: needles found" in out
    assert "0.00 [0.00, 0.49]" in out
    figures = json.loads((tmp_path / "n.json").read_text())
    assert (tmp_path / "n.json").stat().st_mode & 0o777 == 0o600, "it holds what was written after the texts"
    assert (tmp_path / "n.html").stat().st_mode & 0o777 != 0o600
    assert [(r["model"], r["reading"]) for r in figures["results"]] == [
        ("e2e", "learning"),
        ("e2e", "frozen"),
        ("swa", "static"),
    ]
    assert [len(r["trials"]) for r in figures["results"]] == [8, 8, 8]
    assert figures["results"][0]["accuracy"][0]["all"]["n"] == 4
    assert {trial["probe"] for result in figures["results"] for trial in result["trials"]} == {"verbatim"}
    assert "ends with the needle's own words up to its value" in " ".join(out.split())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"s_niah_1.png", "s_niah_3.png"}
    page = (tmp_path / "n.html").read_text()
    assert "a context counts each model&#x27;s own tokens" in page
    assert f"{learning} and {static}, hidden in {tmp_path / 'essay.txt'}." in page
    assert page.count('class="chart wide"') == page.count('class="chart narrow"') == 2
    assert "0.00 [0.00, 0.49]" in page


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--variants", "2"], "name texts with --haystack"),
        (["--depths", "1.5"], "--depths 1.5 is not between 0"),
        (["--depths", "nan"], "--depths nan is not between 0"),
        (["--contexts", "50"], "a context of 50 tokens is too short for the needle"),
        (["--contexts", "4096", "50"], "a context of 50 tokens is too short for the needle"),
        (["--variants", "1", "3", "--contexts", "380", "--haystack", "LONG"], "question of S-NIAH-3 take 38"),
        (["--variants", "3", "--haystack", "SHORT"], "fewer than the context of 4,096; give more text"),
        (["--variants", "3", "--haystack", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_commands_that_cannot_begin(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr("longread.evaluate.search", unwanted)
    if "too short" in reason or "take" in reason:
        monkeypatch.setattr("longread.evaluate.essays", unwanted)
        monkeypatch.setattr("longread.evaluate.noise", unwanted)
    (tmp_path / "short.txt").write_text("A short text. It ends.")
    (tmp_path / "long.txt").write_text(ESSAY)
    names = {"SHORT": "short.txt", "LONG": "long.txt"}
    arguments = [str(tmp_path / names[a]) if a in names else a for a in arguments]
    directory = stored(tmp_path / "m", ByteTokenizer())
    assert main(["needle", str(directory), *arguments, "--json", str(tmp_path / "n.json")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longread: error: ")]
    assert len(errors) == 1
    assert reason in errors[0]
    assert not (tmp_path / "n.json").exists()


def test_a_length_that_only_the_second_model_cannot_read_is_refused_before_the_first_has_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longread.evaluate.search", unwanted)
    few = stored(tmp_path / "few", TOKENIZERS["bpe"])
    many = stored(tmp_path / "many", ByteTokenizer())
    assert main(["needle", str(few), str(many), "--contexts", "360", "--samples", "2"]) == 2
    assert "a context of 360 tokens is too short for the needle" in capsys.readouterr().err
    assert main(["needle", str(many), str(tmp_path / "none"), "--samples", "2"]) == 2
    assert "there is no model at" in capsys.readouterr().err


def unwanted(*_: object, **__: object) -> None:
    raise AssertionError("what is impossible was begun all the same")


def test_offsets_of_long_haystacks_vary() -> None:
    tokenizer = ByteTokenizer()
    haystack = essays([ESSAY], tokenizer, 500)
    samples = make_samples(tokenizer, VARIANTS[2], haystack, 500, [1.0], 8, seed=0)
    begins = {tuple(np.asarray(s.tokens[140:170])) for s in samples}
    assert len(begins) > 4
