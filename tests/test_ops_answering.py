"""Which implementation answers an op, with what it is given, and that it answers where its inputs lie."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops.attention import attention
from longread.ops.attention.reference import reference_attention
from longread.ops.attention.ring import ring_attention
from longread.ops.clipped_sgd import clipped_sgd, clipped_sgd_
from longread.ops.cross_entropy import cross_entropy
from longread.ops.gated_delta_rule import gated_delta_rule
from longread.ops.key_value_binding import Memory, Waiting, key_value_binding
from longread.ops.key_value_binding.reference import reference_key_value_binding
from longread.ops.linear import SharedWeight
from longread.ops.rms_norm import rms_norm
from longread.ops.rotary import frequencies, rotate, rotation
from longread.ops.ssd import ssd

Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], list[Call]]:
    """Puts a function that returns "kernel" in the place of one for GPUs, and says that it can answer."""

    def put(module: str, function: str, asking: str) -> list[Call]:
        calls: list[Call] = []

        def record(*args: Any, **options: Any) -> str:
            calls.append((args, options))
            return "kernel"

        monkeypatch.setattr(importlib.import_module(asking), "fusible", lambda *tensors: True)
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: record}))
        return calls

    return put


Kernel = Callable[[str, str, str], list[Call]]


@pytest.mark.parametrize(
    ("shape", "past", "window", "order", "answers"),
    [
        ((16, 8, 128, 4), 0, None, 0, False),  # nothing hidden but the future: PyTorch's kernels are as fast
        ((16, 8, 128, 4), 0, None, 1, False),
        ((16, 8, 128, 4), 0, None, 2, True),
        ((16, 8, 128, 4), None, 128, 1, False),
        ((16, 8, 128, 4), None, 127, 1, True),
        ((16, 8, 127, 4), 0, None, 0, True),  # so few are not worth a library
        ((1, 1, 2048, 4), 0, None, 1, True),
        ((2, 3, 8, 4), 0, 8, 1, True),
        ((2, 3, 8, 4), 0, 7, 1, True),
        ((2, 3, 8, 4), 0, 4, 1, True),
        ((2, 3, 8, 4), None, None, 1, True),
        ((2, 3, 8, 4), None, 4, 1, True),
        ((2, 3, 8, 4), 1, None, 1, True),
        ((2, 3, 8, 4), 1, 8, 0, True),
        ((2, 3, 8, 128), 0, 4, 1, True),
        ((2, 3, 8, 129), 0, 4, 1, False),
        ((2, 3, 8, 129), 0, 4, 2, False),
        ((1, 1, 200, 4), 0, 4, 1, True),
        ((1, 1, 1, 1), 1, None, 1, True),
        ((2, 3, 0, 4), 1, None, 1, False),
        ((2, 3, 0, 4), 1, None, 2, False),
    ],
)
def test_which_attention_answers(
    shape: tuple[int, ...], past: int | None, window: int | None, order: int, answers: bool, kernel: Kernel
) -> None:
    calls = kernel("longread.ops.attention.triton", "triton_attention", "longread.ops.attention")
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    B, N, _, H = shape
    older = None if past is None else (torch.ones(B, N, past, H), torch.zeros(B, N, past, H))
    gains = torch.ones(H), torch.ones(H)
    out = attention(q, k, v, past=older, window=window, order=order, gains=gains)
    if answers:
        assert out == "kernel"
        assert calls == [((q, k, v), {"past": older, "window": window, "gains": gains})]
    else:
        assert calls == []
        torch.testing.assert_close(out, reference_attention(q, k, v, past=older, window=window))


@pytest.mark.parametrize(("heads", "soft_cap", "answers"), [(6, None, True), (2, None, True), (6, 30.0, False)])
def test_which_answers_where_heads_share(heads: int, soft_cap: float | None, answers: bool, kernel: Kernel) -> None:
    """Kernels share; scores with a cap are beyond them."""
    attending = kernel("longread.ops.attention.triton", "triton_attention", "longread.ops.attention")
    q, k = torch.ones(1, 6, 3, 4), torch.ones(1, heads, 3, 4)
    for order in (0, 1, 2):
        out = attention(q, k, k, past=(k, k), window=4, order=order, soft_cap=soft_cap)
        assert (out == "kernel") if answers else (out.shape == q.shape)
    assert len(attending) == 3 * answers
    ringing = kernel("longread.ops.attention.ring_triton", "triton_ring_attention", "longread.ops.attention.ring")
    new, ring = k[:, :, :1], (torch.zeros(1, heads, 3, 4), torch.zeros(1, heads, 3, 4))
    out = ring_attention(q[:, :, :1], new, new, ring, torch.tensor([5]), window=2, soft_cap=soft_cap)
    assert (out == "kernel") if answers else (out.shape == (1, 6, 1, 4))
    assert len(ringing) == answers


@pytest.mark.parametrize(("H", "answers"), [(256, True), (257, False)])
def test_which_ring_answers(H: int, answers: bool, kernel: Kernel) -> None:
    calls = kernel("longread.ops.attention.ring_triton", "triton_ring_attention", "longread.ops.attention.ring")
    new, ring, position = torch.ones(1, 2, 1, H), (torch.zeros(1, 2, 3, H), torch.zeros(1, 2, 3, H)), torch.tensor([5])
    out = ring_attention(new, new, new, ring, position, window=2)
    assert (out == "kernel") if answers else (out.shape == new.shape)
    options = {"window": 2, "norms": None, "rotary": None, "arrivals": None}
    assert calls == [((new, new, new, ring, position), options)] * answers


def test_a_ring_longer_than_a_head_may_be(kernel: Kernel) -> None:
    calls = kernel("longread.ops.attention.ring_triton", "triton_ring_attention", "longread.ops.attention.ring")
    new, ring = torch.ones(1, 1, 300, 4), (torch.zeros(1, 1, 300, 4), torch.zeros(1, 1, 300, 4))
    assert ring_attention(new, new, new, ring, torch.tensor([5]), window=None) == "kernel"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("shape", "answers"), [((3, 16_384), True), ((3, 16_385), False), ((16_385, 2), True), ((7,), True)]
)
def test_which_norm_answers(shape: tuple[int, ...], answers: bool, kernel: Kernel) -> None:
    calls = kernel("longread.ops.rms_norm.triton", "triton_rms_norm", "longread.ops.rms_norm")
    x, gain, rotary = torch.ones(shape), torch.ones(shape[-1]), object()
    if answers:
        assert rms_norm(x, gain, 1e-6, residual=x, rotary=rotary) == "kernel"  # type: ignore[arg-type]
        assert calls == [((x, gain, 1e-6), {"residual": x, "rotary": rotary})]
    else:
        assert rms_norm(x, gain, 1e-6, residual=x).shape == shape
        assert calls == []


def test_which_step_answers(kernel: Kernel) -> None:
    weights, gradients, working = [torch.ones(2, 3)], [torch.ones(2, 3)], [torch.ones(2, 3)]
    options = {"lr": 0.5, "clip": 2.0, "max_step_norm": torch.tensor(9.0)}
    module = "longread.ops.clipped_sgd"
    calls = kernel(f"{module}.triton", "triton_clipped_sgd", module)
    group: Any = object()
    assert clipped_sgd(weights, gradients, **options, group=group) == "kernel"
    assert calls == [((weights, gradients), {**options, "group": group})]
    calls = kernel(f"{module}.triton", "triton_clipped_sgd_", module)
    assert clipped_sgd_(weights, gradients, working, **options) == "kernel"
    assert calls == [((weights, gradients, working), options)]


@pytest.mark.parametrize(
    ("T", "past", "window", "expected"),
    [
        (64, 0, None, (1, 64, 64)),
        (64, 0, 64, (1, 64, 64)),
        (1, 40, None, (1, 1, 41)),
        (16, 0, 8, (1, 16, 16)),  # at least 16 queries in a block
        (17, 0, 8, (2, 16, 32)),
        (16, 40, 8, (1, 16, 23)),
        (64, 0, 32, (4, 16, 48)),
        (64, 0, 33, (4, 16, 48)),
        (64, 0, 34, (4, 17, 51)),
        (64, 0, 40, (4, 20, 60)),
        (64, 100, 40, (4, 20, 60)),
        (300, 0, 8, (19, 16, 32)),
        (1030, 0, 1024, (5, 256, 1280)),  # and at most 256
    ],
)
def test_a_block_of_queries_meets_the_keys_of_its_band_alone(
    T: int, past: int, window: int | None, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, queries in each, and keys of each: half a window of queries reads one window and a half of keys."""
    met, attend = [], F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        met.append((len(query), query.shape[-2], key.shape[-2]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(1, 1, past + T, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    older, own = (k[:, :, :past], v[:, :, :past]), (k[:, :, past:], v[:, :, past:])
    out = attention(q[:, :, past:], *own, past=older, window=window, order=1)
    assert met == [expected]
    torch.testing.assert_close(out, reference_attention(q[:, :, past:], *own, past=older, window=window))


@pytest.mark.parametrize(("T", "past"), [(1, 0), (1, 9)])
def test_one_query_over_all_its_past_needs_no_mask(T: int, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **given: options.append(given) or q)
    x = torch.ones(1, 1, T, 2)
    attention(x, x, x, past=(torch.ones(1, 1, past, 2),) * 2, window=None, order=0)
    assert [value for given in options for value in given.values() if value is not None and value is not False] == []


def on_meta(*shapes: Sequence[int]) -> list[Tensor]:
    return [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]


def attend(order: int, window: int | None, T: int, past: int) -> Tensor:
    older = on_meta((2, 3, past, 4), (2, 3, past, 4))
    return attention(*on_meta(*[(2, 3, T, 4)] * 3), past=(older[0], older[1]), window=window, order=order)


def ring() -> Tensor:
    with torch.no_grad():
        places = torch.empty(2, 1, 3, 5, 4, device="meta")
        new = [x.detach() for x in on_meta(*[(1, 3, 1, 4)] * 3)]
        position = torch.empty(1, device="meta", dtype=torch.int64)
        return ring_attention(*new, (places[0], places[1]), position, window=3).clone()


def bound(f: Callable[..., Any]) -> Tensor:
    query, key, value, rate, *memory = on_meta(*[(1, 2, 9, 3)] * 3, (1, 2, 9), (1, 2, 6, 3), (1, 2, 6, 3), (1, 2, 3, 6))
    none = Waiting(key[:, :, :0], value[:, :, :0], rate[:, :, :0])
    return f(query, Waiting(key, value, rate), Memory(*memory), none, mini_batch_size=4, lr=0.1, clip=1.0)[0]


def recurrence(f: Callable[..., Any], *shapes: Sequence[int]) -> Tensor:
    return f(*on_meta(*shapes))[0]


OPS: dict[str, Callable[[], Tensor]] = {
    "attention over all": lambda: attend(1, None, 5, 3),
    "attention over few": lambda: attend(1, 4, 8, 3),
    "attention over bands": lambda: attend(1, 8, 40, 3),
    "attention of order 2": lambda: attend(2, 4, 8, 3),
    "ring": ring,
    "binding": lambda: bound(key_value_binding),
    "binding by definition": lambda: bound(reference_key_value_binding),
    "ssd": lambda: recurrence(ssd, (1, 9, 5), (1, 9, 5), (1, 9, 2, 4), (1, 9, 2), (1, 2, 5, 4)),
    "delta rule": lambda: recurrence(
        gated_delta_rule, (1, 9, 2, 5), (1, 9, 2, 5), (1, 9, 2, 4), (1, 9, 2), (1, 9, 2), (1, 2, 5, 4)
    ),
    "norm": lambda: rms_norm(*on_meta((2, 5), (5,)), 1e-6),
    "step": lambda: clipped_sgd(on_meta((2, 3)), on_meta((2, 3)), lr=0.1, clip=1.0)[0][0],
    "losses": lambda: cross_entropy(*on_meta((4, 3), (7, 3)), torch.empty(4, device="meta", dtype=torch.int64)),
    "product": lambda: SharedWeight(on_meta((4, 3))[0], torch.float32)(on_meta((2, 3))[0]),
    "rotary": lambda: rotate(
        on_meta((1, 2, 5, 4))[0], rotation(3, 5, frequencies(4, 1e4, device="meta"), on_meta((1,))[0])
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_answers_where_its_inputs_lie(name: str) -> None:
    """A device without numbers refuses whatever lies elsewhere, backwards too."""
    out = OPS[name]()
    assert out.device.type == "meta"
    if out.requires_grad:
        out.sum().backward()
