"""Any order of operations on sessions that share a model: each is what a plain reader of the same tokens would be."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from longread.config import InnerConfig, ModelConfig
from longread.inner_loop import begin, next_token_logits, read
from longread.model import Transformer, initialize as draw_weights
from longread.session import Session

M, V = 4, 13
INNER = InnerConfig(lr=0.7, clip=0.5)
TOKENS = st.lists(st.integers(0, V - 1), max_size=2 * M + 1)


def make() -> Transformer:
    config = ModelConfig(
        vocab_size=V,
        width=8,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=8,
        window_size=6,
        mini_batch_size=M,
        num_suffix_blocks=1,
    )
    model = Transformer(config).double().requires_grad_(False)
    draw_weights(model, seed=0)
    return model


@dataclass
class Text:
    """A session, and what it must have read: pieces with the way each was read."""

    session: Session
    pieces: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)

    def read(self, tokens: list[int], learn: bool) -> None:
        self.pieces.append((tuple(tokens), learn))


class Sessions(RuleBasedStateMachine):
    """Reading, writing, forking, scoring, saving, restoring, switching learning: interleaved over many sessions."""

    texts = Bundle("texts")

    @initialize()
    def prepare(self) -> None:
        self.model = make()
        self.directory = tempfile.TemporaryDirectory()
        self.files = 0
        self.all: list[Text] = []

    def teardown(self) -> None:
        self.directory.cleanup()

    def keep(self, text: Text) -> Text:
        self.all = [*self.all, text][-4:]
        return text

    @rule(target=texts, learn=st.booleans())
    def create(self, learn: bool) -> Text:
        return self.keep(Text(Session(self.model, INNER, learn=learn)))

    @rule(text=texts, tokens=TOKENS)
    def read(self, text: Text, tokens: list[int]) -> None:
        nll = text.session.read(tokens)
        assert nll.shape == (len(tokens),)
        text.read(tokens, text.session.learn)

    @rule(text=texts, tokens=TOKENS)
    def score(self, text: Text, tokens: list[int]) -> None:
        before = text.session.describe()
        expected = text.session.fork().read(tokens)
        assert torch.equal(text.session.score(tokens).nan_to_num(), expected.nan_to_num())
        assert text.session.describe() == before

    @rule(text=texts, count=st.integers(0, 2 * M), learn=st.sampled_from([None, True, False]), stop=st.booleans())
    def write(self, text: Text, count: int, learn: bool | None, stop: bool) -> None:
        if not text.session.position:
            return
        learned = text.session.learn if learn is None else learn
        writing = text.session.generate(count, seed=count, learn=learn)
        written = []
        for token in writing:
            written.append(token)
            if stop and len(written) == M:
                break
        writing.close()
        if written or (count and learn is not None):
            text.read(written, learned)

    @rule(text=texts, learn=st.booleans())
    def switch(self, text: Text, learn: bool) -> None:
        text.session.learn = learn

    @rule(target=texts, text=texts)
    def fork(self, text: Text) -> Text:
        return self.keep(Text(text.session.fork(), list(text.pieces)))

    @rule(target=texts, text=consumes(texts))
    def save_and_restore(self, text: Text) -> Text:
        self.files += 1
        path = Path(self.directory.name) / str(self.files)
        text.session.save(path)
        restored = Session.restore(path, self.model)
        assert restored.describe() == text.session.describe()
        return self.keep(Text(restored, list(text.pieces)))

    @invariant()
    def each_is_a_plain_reader_of_its_text(self) -> None:
        for text in getattr(self, "all", [])[-2:]:
            session, state = text.session, begin(self.model)
            for tokens, learn in text.pieces:
                rows = torch.tensor([tokens], dtype=torch.long)
                state = read(self.model, state, rows, inner=INNER, learn=learn).state
            assert session.position == state.position
            assert math.isclose(session.drift(), Session.resume(self.model, INNER, state).drift(), abs_tol=1e-9)
            if state.position:
                expected = next_token_logits(self.model, state)
                actual = next_token_logits(self.model, session.state)
                torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


Sessions.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestSessions = Sessions.TestCase


@pytest.mark.slow
class TestManySessions(Sessions.TestCase):
    settings = settings(TestSessions.settings, max_examples=150)
