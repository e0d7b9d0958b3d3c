"""A seed draws one text, wherever it is drawn: in a session, an engine, the server, on the command line, in a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longread.checkpoint import save_model
from longread.cli import main
from longread.engine import Engine
from longread.evaluate import continue_texts
from longread.session import Sampling, Session
from longread.tokenizer import ByteTokenizer, decoded
from tests.server import BOS, INNER, make_model, post, serving

PROMPT, COUNT = "It was read once. ", 40


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 7},
        {"seed": 2**63 + 5, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=["plain", "everything"],
)
def test_a_seed_draws_one_text_everywhere(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make_model(), ByteTokenizer()
    prompt = [BOS, *PROMPT.encode()]
    session = Session(model, INNER)
    session.read(prompt)
    ids = list(session.generate(COUNT, **settings, stop_ids=[BOS]))
    assert len(set(ids)) > 5
    text = "".join(decoded(ids, tokenizer))

    sampling = Sampling(max_tokens=COUNT, stop_ids=[BOS], **settings)
    beside = [Sampling(max_tokens=COUNT, seed=1, temperature=0.2), Sampling(max_tokens=COUNT, temperature=0)]
    with Engine(model, INNER) as engine:
        tasks = [engine.complete(prompt, one) for one in (beside[0], sampling, beside[1])]
        assert [token.id for token in tasks[1] if hasattr(token, "logprob")] == ids

    continued = continue_texts(model, INNER, torch.tensor([prompt]), sampling, learn=True)
    assert continued.tokens[0, : len(ids)].tolist() == ids

    with serving(tmp_path / "sessions") as client:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, **settings}
        assert post(client, "/v1/completions", **body)["choices"][0]["text"] == text

    directory = tmp_path / "model"
    directory.mkdir()
    save_model(directory, model, INNER, tokenizer.fingerprint)
    tokenizer.save(directory)
    options = [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = ["generate", "--model", str(directory), "--device", "cpu", "--prompt", PROMPT, "--max-tokens", str(COUNT)]
    capsys.readouterr()
    assert main([*command, "--quiet", "--json", "-", *options]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text
