"""Answers for lm-evaluation-harness: what is written is what a session of its own writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.config import UserError
from longread.loading import OpenModel, open_model
from longread.session import Sampling
from longread.tokenizer import ByteTokenizer
from tests.lm_eval_readers import TEXT, asked, harness_model, save


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), ByteTokenizer())


@pytest.fixture(scope="module")
def opened(directory: Path) -> OpenModel:
    return open_model(directory, "cpu")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_written_is_what_a_session_writes(directory: Path, opened: OpenModel, batch_size: int) -> None:
    prompts = [TEXT[:30], TEXT[5:35], TEXT[60:90], TEXT[:7]]

    def session_writes(prompt: str, n: int, stops: Sequence[str] = ()) -> str:
        return "".join(opened.session().write(prompt, max_tokens=n, temperature=0, stops=stops))

    model = harness_model(directory, batch_size=batch_size)
    greedy = {"until": [], "max_gen_toks": 24}
    found = model.generate_until(asked([(prompt, greedy) for prompt in prompts]), disable_tqdm=True)
    assert found == [session_writes(prompt, 24) for prompt in prompts]
    assert len(set(found)) == len(prompts)
    stops = [text[11:13] for text in found]
    wishes = [(prompt, {"until": stop, "max_gen_toks": 24}) for prompt, stop in zip(prompts, stops, strict=True)]
    ended = model.generate_until(asked(wishes), disable_tqdm=True)
    assert ended == [text[: text.index(stop)] for text, stop in zip(found, stops, strict=True)]
    several = model.generate_until(asked([(prompt, {"until": stops, "max_gen_toks": 24}) for prompt in prompts]))
    assert several == [session_writes(prompt, 24, stops) for prompt in prompts]
    assert model.generate_until(asked([(prompts[0], {"until": [], "max_gen_toks": 0})])) == [""]


def test_a_session_draws_the_same(directory: Path, opened: OpenModel) -> None:
    from longread.lm_eval.scoring import BatchReader
    from longread.lm_eval.writing import GenerationSettings, _seed, write

    model = harness_model(directory)
    wish = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    settings = GenerationSettings.of(wish | {"max_gen_toks": 20}, max_tokens=5)
    prompt = (256, *TEXT[:33].encode())
    (one, two), other = (
        [
            text
            for _, text in sorted(
                write(BatchReader(opened.model, opened.inner, True), model._prompts, [(prompt, settings)] * n, 2, seed)
            )
        ]
        for n, seed in ((2, 7), (1, 8))
    )
    assert one != two  # the harness asks twice where it wants two answers
    assert [one] != other
    session = opened.session()
    session.read(prompt)
    del wish["do_sample"]
    assert one == opened.tokenizer.decode(session.generate(20, **wish, seed=_seed(7, prompt, settings, 0)))


def test_seeds_of_the_harness_count(directory: Path) -> None:
    model = harness_model(directory)
    wishes = asked([(TEXT[:20], {"until": [], "max_gen_toks": 9, "do_sample": True})])
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(model.generate_until(wishes)[0])
    assert answers[0] == answers[1] != answers[2]


def test_settings_of_an_answer() -> None:
    from longread.lm_eval.writing import GenerationSettings

    def of(**asked: Any) -> GenerationSettings:
        return GenerationSettings.of(asked, max_tokens=64)

    assert of() == GenerationSettings(Sampling(max_tokens=64, temperature=0), ())
    assert of(until="a", max_new_tokens=3) == GenerationSettings(Sampling(max_tokens=3, temperature=0), ("a",))
    assert of(temperature=0.5).sampling.temperature == 0.5
    assert of(temperature=0.5, do_sample=False).sampling.temperature == 0
    assert of(do_sample=True).sampling.temperature == 1
    assert of(do_sample=True, temperature=0).sampling.temperature == 0
    assert of(top_k=0, num_beams=1).sampling.top_k is None
    assert of(max_gen_toks=1, max_tokens=2).sampling.max_tokens == 1
    for wrong, reason in (
        ({"num_beams": 4}, "num_beams is 4"),
        ({"min_p": 0.1}, "knows no 'min_p'"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ):
        with pytest.raises(UserError, match=reason):
            of(**wrong)
