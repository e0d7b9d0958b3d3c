"""When learning is taken back, with losses of the learner written out: limits, and on which tokens a verdict rests."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Reading, ReadingState, begin, read, rescue
from longread.model import Transformer
from tests.tiny import INNER, make, text

NOTHING = math.log(19)  # what a reader that knows nothing pays for a token


def certain(mini_batch: int) -> Transformer:
    """A model that can be wrong by many nats."""
    model = make(3, torch.float64, mini_batch_size=mini_batch)
    with torch.no_grad():
        model.final_norm.weight.mul_(40)
    return model


def easy(model: Transformer, n: int) -> tuple[ReadingState, Tensor]:
    """A state of two tokens, and n tokens after it, each the likeliest."""
    state = before = read(model, begin(model), torch.tensor([[1, 2]]), inner=INNER, learn=False).state
    tokens = []
    for _ in range(n):
        tokens.append(model.logits(state.output).argmax().item())
        state = read(model, state, torch.tensor([tokens[-1:]]), inner=INNER, learn=False).state
    return before, torch.tensor([tokens])


def frozen_cost(model: Transformer, state: ReadingState, tokens: Tensor) -> float:
    return read(model, state, tokens, inner=INNER, learn=False).nll.mean().item()


def verdict(model: Transformer, before: ReadingState, tokens: Tensor, nll: list[float]) -> ReadingState | None:
    """Of a learner that paid this."""
    learned = read(model, before, tokens, inner=INNER)
    learned = learned._replace(nll=torch.tensor([nll], dtype=torch.float64))
    assert isinstance(learned, Reading)
    return rescue(model, before, tokens, learned, inner=INNER)


@pytest.mark.parametrize(("n", "mini_batch"), [(2, 2), (5, 5), (31, 31), (32, 32), (32, 64), (40, 64), (40, 8)])
def test_a_reader_worse_than_one_that_knows_nothing_goes_on_frozen(n: int, mini_batch: int) -> None:
    model = certain(mini_batch)
    before, tokens = easy(model, n)
    assert frozen_cost(model, before, tokens) < 1
    found = verdict(model, before, tokens, [NOTHING + 1.001] * n)
    assert found is not None
    assert found.position == n + 2
    for a, b in zip(found.tensors, read(model, before, tokens, inner=INNER, learn=False).state.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("paid", [NOTHING + 1.0, NOTHING + 0.99, NOTHING - 0.5, 0.0])
def test_one_nat_worse_than_nothing_is_no_harm(paid: float) -> None:
    model = certain(2)
    before, tokens = easy(model, 2)
    assert frozen_cost(model, before, tokens) < NOTHING - 2
    assert verdict(model, before, tokens, [paid] * 2) is None


def test_a_verdict_needs_a_mini_batch_or_32_tokens() -> None:
    for n, mini_batch in ((31, 64), (3, 4), (1, 2)):
        model = certain(mini_batch)
        before, tokens = easy(model, n)
        assert verdict(model, before, tokens, [50.0] * n) is None


def test_a_strange_text_is_strange_to_a_frozen_reader_too() -> None:
    """It must be more than a nat better; exactly a nat is not."""
    model = certain(1)
    before = read(model, begin(model), torch.tensor([text(6)]), inner=INNER, learn=False).state
    token = torch.tensor([[model.logits(before.output).argmin().item()]])
    cost = frozen_cost(model, before, token)
    assert cost > NOTHING + 1
    assert (cost + 1.0) - 1.0 == cost
    assert verdict(model, before, token, [cost + 1.0]) is None
    assert verdict(model, before, token, [cost + 0.5]) is None
    assert verdict(model, before, token, [cost + 1.001]) is not None


def test_only_the_newest_mini_batch_counts() -> None:
    model = certain(4)
    before, tokens = easy(model, 6)
    bad, good = NOTHING + 1.5, 0.0
    assert verdict(model, before, tokens, [good] * 2 + [bad] * 4) is not None
    assert verdict(model, before, tokens, [bad * 9] * 2 + [good] * 4) is None
    assert verdict(model, before, tokens, [good] * 2 + [4 * bad] + [good] * 3) is not None  # the first of the four
    assert verdict(model, before, tokens, [good] * 2 + [bad] + [good] * 3) is None
    assert verdict(model, before, tokens, [good] * 3 + [4 * bad] + [good] * 2) is not None  # the second


def test_the_first_token_of_a_text_has_no_part_in_it() -> None:
    model = certain(4)
    tokens = easy(model, 3)[1]
    first = next(
        token
        for token in range(19)
        if frozen_mean(model, torch.cat((torch.tensor([[token]]), tokens), dim=1)) < NOTHING + 2
    )
    tokens = torch.cat((torch.tensor([[first]]), tokens), dim=1)
    cost = frozen_mean(model, tokens)
    high = 3 * (max(cost, NOTHING) + 1.001)
    assert verdict(model, begin(model), tokens, [math.nan, high, 0.0, 0.0]) is not None
    assert verdict(model, begin(model), tokens, [math.nan, 0.0, 0.0, high]) is not None
    assert verdict(model, begin(model), tokens, [math.nan, 0.0, 0.0, NOTHING + 1.5]) is None


def frozen_mean(model: Transformer, tokens: Tensor) -> float:
    """Of all but the first token of a text."""
    return read(model, begin(model), tokens, inner=INNER, learn=False).nll[0, 1:].mean().item()


def test_broken_weights_are_given_up_for_those_before_any_reading() -> None:
    model = certain(4)
    before, tokens = easy(model, 4)
    broken = dataclasses.replace(before, fast=tuple(type(w)(*(x * math.nan for x in w)) for w in before.fast))
    found = verdict(model, broken, tokens, [50.0] * 4)
    assert found is not None
    for a, b in zip(found.fast, begin(model).fast, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_cannot_learn_has_nothing_to_take_back() -> None:
    model = make(3, torch.float64, num_suffix_blocks=0)
    before = begin(model)
    assert verdict(model, before, torch.tensor([text(8)]), [math.nan] + [50.0] * 7) is None
