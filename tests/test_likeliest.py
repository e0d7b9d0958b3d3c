"""The likeliest token of each row, by PyTorch and by kernels, which without a GPU run in Triton's interpreter."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.engine import Engine, Sampling, Token
from longread.inner_loop import ReadingState, begin, places, read
from longread.inner_loop.places import LikeliestTokens, Places
from longread.model import Transformer
from longread.ops import fusible
from longread.ops.likeliest import likeliest
from longread.session import Session
from tests.tiny import INNER, M, make, text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(interpreter: None, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("longread.ops.likeliest.triton")
    monkeypatch.setattr(module, "BLOCK", 16)
    return module


def drawn(*shape: int) -> Tensor:
    return (20 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(DEVICE)


def row(**numbers: float) -> Tensor:
    """50 numbers, of which some are given, by their places."""
    x = drawn(1, 50)
    for name, number in numbers.items():
        x[0, int(name[1:])] = number
    return x


ROWS = {
    "several": drawn(3, 50),
    "one block": drawn(2, 16),
    "one number": drawn(2, 1),
    "strided": drawn(50, 3).t(),
    "of a larger tensor": drawn(3, 80)[:, 7:57],
    "equal ones in two blocks": row(_20=99, _21=99, _40=99),
    "a padded vocabulary": row(**{f"_{i}": -math.inf for i in range(30, 50)}),
    "nothing is possible": torch.full((2, 50), -math.inf, device=DEVICE),
    "infinity": row(_33=math.inf, _3=math.inf),
    "no number": row(_33=math.nan, _3=math.inf, _40=math.nan),
    "far below": drawn(2, 50) - 1e30,
}


@pytest.mark.parametrize("case", ROWS)
def test_the_kernels(case: str, kernels: Any) -> None:
    logits = ROWS[case]
    ids, log_p = kernels.triton_likeliest(logits)
    expected = logits.argmax(-1)
    assert ids.dtype == torch.long
    assert torch.equal(ids, expected)
    of_all = logits.double().log_softmax(-1)
    torch.testing.assert_close(log_p.double(), of_all.gather(-1, expected[:, None])[:, 0], equal_nan=True)
    alone = [kernels.triton_likeliest(one[None]) for one in logits]
    for found, parts in zip((ids, log_p), zip(*alone, strict=True), strict=True):
        assert torch.equal(found.nan_to_num(), torch.cat(parts).nan_to_num())


def test_without_a_kernel_it_is_the_definition() -> None:
    logits = drawn(3, 50).double()
    ids, log_p = likeliest(logits)
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(log_p, logits.log_softmax(-1).amax(-1))


def test_what_was_sent_is_given_until_it_is_forgotten() -> None:
    """And looked for where it was sent of fewer lanes than are asked about."""
    logits = drawn(4, 50)
    tokens, (ids, log_p) = LikeliestTokens(logits), likeliest(logits)
    expected = list(zip(ids.tolist(), log_p.tolist(), strict=True))
    assert tokens.wait(logits) == expected
    changed = logits.flip(0)
    assert tokens.wait(changed) == expected
    tokens.forget()
    assert tokens.wait(changed[:2]) == expected[::-1][:2]
    assert tokens.wait(changed) == expected[::-1]
    tokens.find(logits[:3])
    tokens.send(3)
    assert tokens.wait(changed[:3]) == expected[:3]


def after(model: Transformer, n: int, seed: int) -> ReadingState:
    return read(model, begin(model), torch.tensor([text(n, seed)]), inner=INNER).state


@pytest.fixture
def passes_find(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; of how many lanes something was looked for elsewhere than in a pass."""
    elsewhere: list[int] = []

    def wait(tokens: LikeliestTokens, logits: Tensor) -> list[tuple[int, float]]:
        if len(logits) > tokens._sent:
            elsewhere.append(len(logits))
        return own_wait(tokens, logits)

    own_wait = LikeliestTokens.wait
    monkeypatch.setattr(places, "can_capture", lambda device: True)
    monkeypatch.setattr(places, "is_on_a_gpu", lambda x: True)
    monkeypatch.setattr(LikeliestTokens, "wait", wait)
    return elsewhere


def test_lanes_say_what_is_likeliest_there_now(passes_find: list[int]) -> None:
    """After a pass, whoever comes, moves, or gets more lanes."""
    model = make(3, torch.float64)
    lanes = Places(model, 3, learn=True)

    def check(count: int, looked: bool) -> None:
        passes_find.clear()
        ids, log_p = likeliest(lanes.logits(count))
        found_ids, found_log_p = zip(*lanes.likeliest(count), strict=True)
        assert found_ids == tuple(ids.tolist())
        torch.testing.assert_close(log_p.new_tensor(found_log_p), log_p, rtol=0, atol=0, equal_nan=True)
        assert passes_find == [count] * looked

    lanes.put(0, after(model, 3, 0), learn=True)
    lanes.put(2, after(model, 5, 1), learn=True)
    check(3, True)
    lanes.read(torch.tensor(text(3)))
    check(3, False)
    check(1, False)
    lanes.move(2, 1)
    check(2, True)
    lanes.read(torch.tensor(text(2, 1)))
    check(2, False)
    lanes.put(1, after(model, 9, 2), learn=True)
    check(2, True)
    lanes.read(torch.tensor(text(1, 2)))
    check(1, False)
    check(2, True)
    lanes.resize(5)
    check(2, True)


def test_a_session_and_an_engine_take_what_passes_find(passes_find: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over inner steps; beside one that asks for more, with equal numbers."""
    model, prompt, count = make(3, torch.float64), text(M + 1), 3 * M
    with monkeypatch.context() as plain:
        plain.setattr(places, "is_on_a_gpu", lambda x: False)
        plain.setattr(places, "can_capture", lambda device: False)
        session = Session(model, INNER)
        session.read(prompt)
        expected = list(session.generate(count, temperature=0))
    passes_find.clear()
    session = Session(model, INNER)
    session.read(prompt)
    assert list(session.generate(count, temperature=0)) == expected
    assert passes_find == [1]  # of what has only been read
    passes_find.clear()
    found = []
    with Engine(model, INNER) as engine:
        for logprobs in ([0], [0, 2]):
            ids = [engine.create().id for _ in logprobs]
            settings = [Sampling(max_tokens=count, temperature=0, logprobs=n) for n in logprobs]
            for sid in ids:
                engine.append(sid, prompt).result()
            tasks = [engine.generate(sid, s) for sid, s in zip(ids, settings, strict=True)]
            found += [[token for token in task if isinstance(token, Token)] for task in tasks]
    assert 1 <= len(passes_find) < M  # fewer than inner steps
    for tokens in found:
        assert [token.id for token in tokens] == expected
        assert [token.logprob for token in tokens] == [token.logprob for token in found[0]]


def test_kernels_that_find_others_are_not_used(monkeypatch: pytest.MonkeyPatch, passes_find: list[int]) -> None:
    """It is wrong as a kernel is: not where plain PyTorch is asked for."""
    plain = places.likeliest

    def by_a_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_p = plain(x)
        return (ids if getattr(fusible._here, "plain", False) else ids ^ 1), log_p

    monkeypatch.setattr(places, "likeliest", by_a_kernel)
    model = make(3, torch.float64)
    lanes = Places(model, 1, learn=True)
    lanes.put(0, after(model, 3, 0), learn=True)
    with pytest.warns(places.KernelsRefused, match="find other tokens likeliest"):
        lanes.read(torch.tensor([1]))
