"""Speculative decoding: the verifier's distribution whatever is guessed; two readers that have read what is written."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig, UserError
from longread.model import Transformer, initialize
from longread.session import Sampling, Session
from longread.session.sampling import probabilities
from longread.speculative import Speculation, verdict
from longread.speculative.verifier import Verifier
from tests import tiny

M, V = 4, 11
INNER = InnerConfig(lr=0.7, clip=0.5)
SAMPLING = [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"temperature": 0.6, "top_k": 3}, marks=pytest.mark.slow),
    pytest.param({"top_p": 0.6}, marks=pytest.mark.slow),
    pytest.param({"repetition_penalty": 1.5, "temperature": 0.8}, marks=pytest.mark.slow),
    {"repetition_penalty": 1.5, "temperature": 0.8, "top_k": 3, "top_p": 0.8},
]


def make(seed: int = 0, **changes: object) -> Transformer:
    model = Transformer(tiny.config(**{"vocab_size": V, "num_suffix_blocks": 0} | changes))
    initialize(model, seed=seed)
    with torch.no_grad():  # so that some tokens are much likelier than others
        model.final_norm.weight.mul_(20)
    return model.double().requires_grad_(False)


def verifying(**changes: object) -> Session:
    return Session(make(1, **{"attention": "full"} | changes), INNER)


def drafting(**changes: object) -> Session:
    return Session(make(2, **{"num_suffix_blocks": 2} | changes), INNER)


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def same_state(a: Session, b: Session) -> None:
    assert (a.position, a.recent) == (b.position, b.recent)
    for x, y in zip(a.state.tensors, b.state.tensors, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


# --- what is kept and what is dropped: exact, by enumeration -----------------------------------------------------


def tables(k: int, vocabulary: int, seed: int, zeros: bool) -> tuple[dict, dict]:
    """Random distributions p and q of the next token after every text of up to k tokens."""
    generator, p, q = torch.Generator().manual_seed(seed), {}, {}
    for n in range(k + 1):
        for prefix in itertools.product(range(vocabulary), repeat=n):
            for table in (p, q):
                weights = torch.rand(vocabulary, generator=generator, dtype=torch.float64) ** 3
                if zeros:  # as after top-k
                    weights[torch.randint(vocabulary, (), generator=generator)] = 0.0
                table[prefix] = weights / weights.sum()
    return p, q


@pytest.mark.parametrize(("k", "vocabulary"), [(1, 2), (1, 5), (2, 3), (3, 3)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_has_the_verifiers_distribution_exactly(
    k: int, vocabulary: int, zeros: bool, seed: int
) -> None:
    """Every sequence of guesses, every number of kept ones: their probabilities add up to those of the verifier."""
    p, q = tables(k, vocabulary, seed, zeros)
    total = dict.fromkeys(itertools.product(range(vocabulary), repeat=k + 1), 0.0)
    for guesses in itertools.product(range(vocabulary), repeat=k):
        guessed = math.prod(q[guesses[:i]][guesses[i]].item() for i in range(k))
        if not guessed:
            continue
        rows_p = torch.stack([p[guesses[:i]] for i in range(k + 1)])
        rows_q = torch.stack([q[guesses[:i]] for i in range(k)])
        chance = [min(1.0, (rows_p[i, g] / rows_q[i, g]).item()) for i, g in enumerate(guesses)]
        for kept in range(k + 1):
            weight = guessed * math.prod(chance[:kept]) * (1.0 if kept == k else 1 - chance[kept])
            if weight < 1e-300:
                continue
            # just inside of each chance, and just outside of the one that ends it
            uniform = [c * (1 - 1e-9) for c in chance[:kept]] + [c + (1 - c) * 1e-9 for c in chance[kept:]]
            found = verdict(rows_p, rows_q, torch.tensor(guesses), torch.tensor(uniform, dtype=torch.float64))
            assert found.accepted == kept
            rest = found.rest / found.rest.sum()
            for token, after in enumerate(rest.tolist()):
                head = (*guesses[:kept], token)
                for tail in itertools.product(range(vocabulary), repeat=k - kept):
                    whole = (*head, *tail)
                    ahead = math.prod(p[whole[:i]][whole[i]].item() for i in range(kept + 1, k + 1))
                    total[whole] += weight * after * ahead
    for whole, found in total.items():
        expected = math.prod(p[whole[:i]][whole[i]].item() for i in range(k + 1))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_equal_distributions_keep_every_guess() -> None:
    p = torch.rand(4, V).softmax(-1)
    guesses = torch.multinomial(p[:3], 1).squeeze(1)
    found = verdict(p, p[:3], guesses, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert found.accepted == 3
    assert torch.equal(found.rest, p[3])
    refused = verdict(p, p[:3], guesses, torch.tensor([0.0, 2.0, 0.0]))  # as rounding may do
    assert torch.equal(refused.rest, p[1])


# --- the whole thing, on models ---------------------------------------------------------------------------------------


def chances(session: Session, length: int, **sampling: Any) -> Tensor:
    """The probability of every continuation of so many tokens, [V ** length], from a session alone."""
    rows = [(1.0, session)]
    for _ in range(length):
        following = []
        for chance, session in rows:
            logits = session.model.logits(session.state.output)
            for token, p in enumerate(probabilities(logits, Sampling(**sampling), [session.recent])[0].tolist()):
                fork = session.fork()
                fork.read([token])
                following.append((chance * p, fork))
        rows = following
    return torch.tensor([chance for chance, _ in rows])


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("learn", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sampled_texts_have_the_verifiers_distribution(sampling: dict, learn: bool) -> None:
    """Chi-square over all continuations of two tokens, from fixed seeds; the drafter's distribution fails the test."""
    verifier, drafter = verifying(vocab_size=4, num_blocks=1), drafting(vocab_size=4, num_blocks=1, num_suffix_blocks=1)
    drafter.learn = learn
    prompt, length, draws = [t % 4 for t in text(2 * M)], 2, 200
    Speculation(verifier, drafter).read(prompt)
    expected = draws * chances(verifier, length, **sampling)
    kept = expected >= 1

    def statistic(counts: Tensor) -> float:
        lumped = [torch.cat((x[kept], x[~kept].sum().view(1))) for x in (counts, expected)]
        return ((lumped[0] - lumped[1]) ** 2 / lumped[1].clamp(min=0.5)).sum().item()

    counts = torch.zeros_like(expected)
    for seed in range(draws):
        pair = Speculation(verifier.fork(), drafter.fork(), draft_tokens=2)
        first, second = pair.generate(length, seed=seed, **sampling)
        counts[4 * first + second] += 1
    assert counts[expected == 0].sum() == 0
    cells = int(kept.sum())
    limit = cells + 4 * math.sqrt(2 * cells)  # four deviations above the mean of chi-square
    assert statistic(counts) < limit
    assert statistic(draws * chances(drafter, length, **sampling)) > limit


@pytest.mark.parametrize("prompts", [5, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("attention", "num_blocks", "double"),
    [
        ("full", 2, True),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("full", 2, False), ("hybrid", 6, False))),
    ],
    ids=str,
)
def test_greedy_is_the_verifier_alone(attention: str, num_blocks: int, double: bool, prompts: int) -> None:
    """Whatever the drafter: a bad one, learning or not, or the verifier itself."""
    verifier, drafter = verifying(attention=attention, num_blocks=num_blocks), drafting()
    if not double:
        verifier.model.float()
        drafter.model.float()
    for prompt in range(prompts):
        start = text(1 + prompt % 20, seed=prompt)
        alone = Session(verifier.model, INNER)
        alone.read(start)
        expected = list(alone.generate(11, temperature=0))
        frozen = Session(drafter.model, INNER, learn=False)
        for other in (Session(drafter.model, INNER), frozen, Session(verifier.model, INNER)):
            pair = Speculation(Session(verifier.model, INNER), other, draft_tokens=1 + prompt % 5)
            pair.read(start)
            assert list(pair.generate(11, temperature=0)) == expected
        accepted = sum(found.accepted for found in pair.rounds)
        assert accepted == sum(found.drafted for found in pair.rounds)  # it guesses its own tokens


@pytest.mark.parametrize("start", [1, M - 1, M, M + 1, 3 * M])
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_both_have_read_what_was_written(start: int, sampling: dict) -> None:
    """The drafter has learned from it exactly as from a text that it is given, and dropped guesses left no trace."""
    pair = Speculation(verifying(), drafting(), draft_tokens=3)
    readers = verifying(), drafting()
    pair.read(text(start))
    written = list(pair.generate(2 * M + 3, seed=7, **sampling))
    for session, reader in zip((pair.verifier, pair.drafter), readers, strict=True):
        reader.read([*text(start), *written])
        same_state(session, reader)
    assert pair.drafter.drift() > 0
    assert sum(found.accepted < found.drafted for found in pair.rounds)  # else nothing was dropped
    assert sum(found.accepted + 1 for found in pair.rounds) == len(written)


def test_a_reader_that_stops_listening_leaves_both_where_it_stopped() -> None:
    for count in range(1, 8):
        pair = Speculation(verifying(), verifying(), draft_tokens=3)
        pair.read(text(5))
        writing = pair.generate(20, seed=3)
        written = [next(writing) for _ in range(count)]
        writing.close()
        for session in (pair.verifier, pair.drafter):
            reader = verifying()
            reader.read([*text(5), *written])
            same_state(session, reader)


def test_a_stop_token_ends_the_text_unread() -> None:
    free = Speculation(verifying(), drafting())
    free.read(text(9))
    written = list(free.generate(30, seed=3))
    stop = written[7]
    pair = Speculation(verifying(), drafting())
    pair.read(text(9))
    assert list(pair.generate(30, seed=3, stop_ids={stop})) == written[: written.index(stop)]
    assert pair.verifier.position == pair.drafter.position == 9 + written.index(stop)


def test_the_same_seed_writes_the_same_and_goes_on() -> None:
    def written(seed: int | None) -> list[int]:
        pair = Speculation(verifying(), drafting())
        pair.read(text(9))
        return [*pair.generate(7, seed=seed), *pair.generate(0), *pair.generate(9, seed=seed)]

    once = written(1)
    assert len(once) == 16
    assert once == written(1)
    assert once != written(2)
    assert written(None) != written(None)


def test_rounds_say_where_and_how_many() -> None:
    pair = Speculation(verifying(), drafting(), draft_tokens=4)
    pair.read(text(9))
    list(pair.generate(20, seed=0))
    position = 9
    for found in pair.rounds:
        assert found.position == position
        assert 0 <= found.accepted <= found.drafted <= 4
        position += found.accepted + 1
    assert position == 29


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, marks=pytest.mark.slow) for changes in ({}, {"attention": "window"})),
        {"attention": "hybrid", "num_blocks": 6},
    ],
    ids=str,
)
def test_a_verifier_takes_tokens_back(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longread.speculative.verifier.SPARE", 3)  # so that room runs out
    session = verifying(**changes)
    session.read(text(20))
    verifier = Verifier(session.model, session.state)
    for i in range(12):
        tried = text(1 + i % 5, seed=i)
        logits = verifier.read(torch.tensor(tried))
        ahead = session.fork()
        for j, token in enumerate(tried):
            ahead.read([token])
            expected = ahead.model.logits(ahead.state.output)[0]
            torch.testing.assert_close(logits[j], expected, rtol=1e-9, atol=1e-9)
        taken_back = i % (len(tried) + 1)
        verifier.take_back(taken_back)
        session.read(tried[: len(tried) - taken_back])
        assert verifier.position == session.position


@pytest.mark.parametrize(
    ("make_pair", "reason"),
    [
        (lambda: Speculation(verifying(), drafting(vocab_size=7)), "the verifier knows 11 tokens and the drafter 7"),
        (lambda: Speculation(verifying(), drafting(), draft_tokens=0), "draft_tokens is 0; it must be at least 1"),
        (lambda: Speculation(verifying(attention="window", mixer="mamba2"), drafting()), "mixer mamba2 cannot"),
        (lambda: Speculation(verifying(), drafting()).generate(5), "the verifier has nothing to continue"),
        (lambda: Speculation(verifying(), drafting()).generate(-5), "max_tokens is -5"),
    ],
)
def test_what_cannot_be_is_refused(make_pair, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=reason):
        make_pair()


def test_a_verifier_that_learns_is_refused_and_a_frozen_one_verifies() -> None:
    pair = Speculation(drafting(), drafting())
    pair.read(text(9))
    with pytest.raises(UserError, match="the verifier learns while it writes"):
        pair.generate(5)
    pair.verifier.learn = False
    alone = pair.verifier.fork()
    assert list(pair.generate(12, temperature=0)) == list(alone.generate(12, temperature=0))


@pytest.mark.gpu
@pytest.mark.parametrize("learn", [True, False])
def test_greedy_on_a_gpu_is_the_verifier_alone(learn: bool) -> None:
    verifier, drafter = make(1, attention="full").float().cuda(), make(2, num_suffix_blocks=2).float().cuda()
    for prompt in range(5):
        alone = Session(verifier, INNER)
        alone.read(text(5 + prompt, seed=prompt))
        pair = Speculation(alone.fork(), Session(drafter, INNER, learn=learn))
        pair.drafter.read(text(5 + prompt, seed=prompt))
        assert list(pair.generate(40, temperature=0)) == list(alone.generate(40, temperature=0))
        assert pair.verifier.position == pair.drafter.position == 45 + prompt
