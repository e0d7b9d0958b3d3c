"""A model may know more ids than its tokenizer has tokens: none of them is ever written, by anyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longread.checkpoint import load_model, save_model
from longread.cli import main
from longread.config import InnerConfig
from longread.engine import Engine, Sampling
from longread.loading import OpenModel, open_model
from longread.speculative import Speculation
from longread.tokenizer import ByteTokenizer
from tests.tiny import make

V, PADDED = 257, 264
WAYS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 2.0}, {"temperature": 2.0, "top_p": 0.9, "top_k": 50}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that would like nothing better than to write an id that is no token."""
    directory = tmp_path_factory.mktemp("padded")
    model = make(vocab_size=PADDED, window_size=16, mini_batch_size=8)
    with torch.no_grad():
        model.embedding.weight[V:] = 20 * torch.randn(PADDED - V, 16)
    save_model(directory, model, InnerConfig(), ByteTokenizer.fingerprint)
    ByteTokenizer().save(directory)
    return directory


@pytest.fixture
def opened(path: Path) -> OpenModel:
    return open_model(path, "cpu")


def test_it_would_write_them(path: Path) -> None:
    """Else the others show nothing. A model without its tokenizer knows of no padding."""
    from longread.session import Session

    session = Session(load_model(path).model, InnerConfig())
    session.read([1, 2, 3])
    assert max(session.generate(4, temperature=0)) >= V


@pytest.mark.parametrize("way", WAYS)
def test_a_session_writes_tokens(opened: OpenModel, way: dict[str, Any]) -> None:
    session = opened.session()
    session.read("A text.")
    assert max(session.generate(30, seed=0, repetition_penalty=1.2, **way)) < V


@pytest.mark.parametrize("way", WAYS)
def test_a_draft_is_of_tokens(opened: OpenModel, way: dict[str, Any]) -> None:
    pair = Speculation(opened.session(learn=False), opened.session())
    pair.read("A text.")
    assert max(pair.generate(20, seed=0, **way)) < V


def test_the_engine_writes_tokens_and_ranks_tokens(opened: OpenModel, tmp_path: Path) -> None:
    with Engine(opened.model, opened.inner, directory=tmp_path, fingerprint="x") as engine:
        for way in WAYS:
            sid = engine.create().id
            engine.append(sid, list(b"A text.")).result(60)
            for token in engine.generate(sid, Sampling(max_tokens=12, seed=0, logprobs=5, **way)):
                assert max([token.id, *(i for i, _ in token.top)]) < V


def test_what_is_written_is_text(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(path), "--device", "cpu", "--prompt", "A text.", "--max-tokens", "20"]
    assert main([*arguments, "--seed", "0"]) == 0
    assert capsys.readouterr().out


def test_losses_are_those_of_all_ids(path: Path, opened: OpenModel) -> None:
    """As another library finds them, that knows of no padding either."""
    from longread.session import Session

    plain = Session(load_model(path).model, InnerConfig())
    ids = list(b"A text that is longer than a mini-batch.")
    assert torch.equal(opened.session().read(ids)[1:], plain.read(ids)[1:])
