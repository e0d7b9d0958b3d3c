"""The recurrences of the baselines: token by token, in chunks, and by kernels, are one function."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longread.ops import flash_linear_attention, gated_delta_rule as delta_op, ssd as ssd_op
from longread.ops.gated_delta_rule import gated_delta_rule
from longread.ops.gated_delta_rule.chunked import chunked_gated_delta_rule
from longread.ops.gated_delta_rule.reference import reference_gated_delta_rule
from longread.ops.key_value_binding import Memory, Waiting, key_value_binding
from longread.ops.key_value_binding.reference import reference_key_value_binding
from longread.ops.ssd import ssd
from longread.ops.ssd.chunked import chunked_ssd
from longread.ops.ssd.reference import reference_ssd

Recurrence = Callable[..., tuple[Tensor, Tensor]]
RECURRENCES: dict[str, tuple[Recurrence, Recurrence, Recurrence]] = {
    "ssd": (reference_ssd, chunked_ssd, ssd),
    "gated_delta_rule": (reference_gated_delta_rule, chunked_gated_delta_rule, gated_delta_rule),
}
each_recurrence = pytest.mark.parametrize("name", RECURRENCES)


def inputs(name: str, T: int, *, B: int = 2, N: int = 3, J: int = 5, H: int = 4, scale: float = 1.0) -> list[Tensor]:
    """Float64 arguments of a recurrence, the state last; decays from nearly none to nearly all."""
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    value, log_decay, state = normal(B, T, N, H), -scale * normal(B, T, N).exp(), normal(B, N, J, H)
    if name == "ssd":
        return [normal(B, T, J), normal(B, T, J), value, log_decay, state]
    query, key = normal(B, T, N, J), F.normalize(normal(B, T, N, J), dim=-1)
    return [query, key, value, normal(B, T, N).sigmoid(), log_decay, state]


def with_gradients(f: Recurrence, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Values, and the gradients of a number that all of them enter."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    out, state = f(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    loss = (out.double() * weight).sum() + (state.double().sin()).sum()
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@each_recurrence
@pytest.mark.parametrize("T", [1, 2, 7, 15, 16, 17, 32, 45, 70, 96])
def test_chunks_are_the_recurrence(name: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients in float64, at the borders of chunks and of groups too, from a state that is not zero."""
    for module in (delta_op.chunked, ssd_op.chunked):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(ssd_op.chunked, "GROUP", 2)
    reference, chunked, op = RECURRENCES[name]
    expected = with_gradients(reference, inputs(name, T))
    for found in (with_gradients(chunked, inputs(name, T)), with_gradients(op, inputs(name, T))):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@each_recurrence
def test_long_chunks_with_strong_decay_stay_finite(name: str) -> None:
    """exp(g_i − g_j) for j > i would overflow; it must not reach values or gradients."""
    reference, chunked, _ = RECURRENCES[name]
    arguments = inputs(name, 130, scale=30.0)
    for x, y in zip(with_gradients(chunked, arguments), with_gradients(reference, arguments), strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@each_recurrence
def test_pieces_are_the_whole(name: str) -> None:
    _, chunked, _ = RECURRENCES[name]
    *arguments, state = inputs(name, 70)
    whole, last = chunked(*arguments, state)
    parts, first = [], 0
    for size in (1, 40, 0, 29):
        out, state = chunked(*(x[:, first : first + size] for x in arguments), state)
        parts.append(out)
        first += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-11)


@each_recurrence
def test_gradients_are_finite_differences(name: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(name, 4, B=1, N=2, J=3, H=2)]
    for f in RECURRENCES[name][:2]:
        assert torch.autograd.gradcheck(f, leaves)


@each_recurrence
def test_half_precision_keeps_a_wide_state(name: str) -> None:
    reference, _, op = RECURRENCES[name]
    arguments = inputs(name, 40, scale=0.1)
    narrow = [x.bfloat16() for x in arguments[:-2]] + [x.float() for x in arguments[-2:]]
    out, state = op(*narrow)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, last = reference(*(x.double() for x in narrow))
    assert (out.double() - expected).norm() / expected.norm() < 0.01
    torch.testing.assert_close(state.double(), last, rtol=0, atol=1e-4)


def test_the_delta_rule_replaces_what_a_key_held() -> None:
    """With β = 1 and no decay a key answers with the value written last; without erasing it would be the sum."""
    key = torch.eye(3, dtype=torch.float64)[[0, 1, 0]].view(1, 3, 1, 3)
    value = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).view(1, 3, 1, 1)
    ones, zeros = torch.ones(1, 3, 1, dtype=torch.float64), torch.zeros(1, 3, 1, dtype=torch.float64)
    _, state = chunked_gated_delta_rule(key, key, value, ones, zeros, torch.zeros(1, 1, 3, 1, dtype=torch.float64))
    assert state.flatten().tolist() == [5.0, 2.0, 0.0]
    _, summed = chunked_ssd(key[:, :, 0], key[:, :, 0], value, zeros, torch.zeros(1, 1, 3, 1, dtype=torch.float64))
    assert summed.flatten().tolist() == [6.0, 2.0, 0.0]


M = 4


def binding(T: int, waiting: int, *, B: int = 2, N: int = 2, H: int = 3, E: int = 6) -> list[Tensor]:
    """Float64: query, key, value, rate, three matrices, and key, value and rate of tokens that wait."""
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tokens = [normal(B, N, T, H), normal(B, N, T, H), normal(B, N, T, H), normal(B, N, T).sigmoid()]
    matrices = [0.4 * normal(*shape) for shape in ((B, N, E, H), (B, N, E, H), (B, N, H, E))]
    return [*tokens, *matrices, normal(B, N, waiting, H), normal(B, N, waiting, H), normal(B, N, waiting).sigmoid()]


def bound(f: Callable, arguments: Sequence[Tensor], *, clip: float | None, asks: bool = True) -> list[Tensor]:  # type: ignore[type-arg]
    """Values, and the gradients of a number that all of them enter."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    query = leaves[0] if asks else None
    out, memory, left = f(
        query, Waiting(*leaves[1:4]), Memory(*leaves[4:7]), Waiting(*leaves[7:]), mini_batch_size=M, lr=0.3, clip=clip
    )
    loss = out.sin().sum() + sum(w.cos().sum() for w in memory)
    return [out, *memory, *left, *torch.autograd.grad(loss, leaves[0 if asks else 1 :], materialize_grads=True)]


@pytest.mark.parametrize("clip", [None, 0.3, 1e6])
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("T", "waiting"), [(1, 0), (3, 0), (4, 0), (9, 0), (1, 3), (5, 2), (12, 3)])
def test_binding_is_its_definition(T: int, waiting: int, asks: bool, clip: float | None) -> None:
    """Steps that autograd takes, token by token, against steps written out; their gradients of the second order too."""
    expected = bound(reference_key_value_binding, binding(T, waiting), clip=clip, asks=asks)
    found = bound(key_value_binding, binding(T, waiting), clip=clip, asks=asks)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_binding_gradients_are_finite_differences() -> None:
    arguments = [x.requires_grad_() for x in binding(6, 0, B=1, N=1, H=2, E=2)]

    def f(*x: Tensor) -> tuple[Tensor, ...]:
        out, memory, _ = key_value_binding(
            x[0], Waiting(*x[1:4]), Memory(*x[4:7]), Waiting(*x[7:]), mini_batch_size=M, lr=0.3, clip=0.5
        )
        return out, *memory

    assert torch.autograd.gradcheck(f, arguments)


def test_binding_learns_what_it_is_shown() -> None:
    """The same pairs again and again: the answer to a key comes closer to its value."""
    _, key, value, rate, *memory, _, _, _ = binding(M, 0, H=4)
    none = Waiting(key[:, :, :0], value[:, :, :0], rate[:, :, :0])
    again = Waiting(key.repeat(1, 1, 60, 1), value.repeat(1, 1, 60, 1), torch.ones_like(rate).repeat(1, 1, 60))
    out, _, left = key_value_binding(None, again, Memory(*memory), none, mini_batch_size=M, lr=0.1, clip=1.0)
    missed = (out - again.value).square().sum(-1).unflatten(2, (60, M)).mean((0, 1, 3))
    assert missed[-1] < 0.2 * missed[0]
    assert left.key.shape[2] == 0


def test_without_the_package_chunks_answer_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_linear_attention._is_installed.cache_clear()
    monkeypatch.setattr(flash_linear_attention, "fusible", lambda *tensors: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    query, key, value, *others = (x.bfloat16() for x in inputs("gated_delta_rule", 3))
    with pytest.warns(UserWarning, match="run pip install fla-core"):
        assert not flash_linear_attention.answers(query, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, _ = gated_delta_rule(query, key, value, others[0], others[1].float(), others[2].float())
    assert out.shape == value.shape
    flash_linear_attention._is_installed.cache_clear()


@pytest.mark.parametrize(
    ("triton", "capability", "right"),
    [
        *[("3.3.1", (9, 0), True), ("3.4.0", (9, 0), False), ("3.6.0", (9, 0), False), ("3.6.0+git1", (9, 0), False)],
        *[("3.7.0", (9, 0), False), ("3.7.1", (9, 0), True), ("3.10.0", (9, 0), True), ("3.6.0", (8, 0), True)],
    ],
)
def test_no_gradient_from_kernels_that_a_compiler_makes_wrong(
    triton: str, capability: tuple[int, int], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_linear_attention._gradients_are_right.cache_clear()
    monkeypatch.setattr(flash_linear_attention, "fusible", lambda *tensors: True)
    monkeypatch.setattr(flash_linear_attention, "_is_installed", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    narrow = [x.bfloat16() for x in inputs("ssd", 3)[:3]]
    with nullcontext() if right else pytest.warns(UserWarning, match=f"need Triton 3.7.1, not {re.escape(triton)}"):
        assert flash_linear_attention.answers(*narrow) is right
    with torch.no_grad():
        assert flash_linear_attention.answers(*narrow)
    flash_linear_attention._gradients_are_right.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is missing: the extra fla")
@each_recurrence
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 1024])
@pytest.mark.parametrize(("J", "H"), [(64, 64), (128, 64), (96, 192), (120, 240)])
def test_kernels_are_the_recurrence(name: str, T: int, J: int, H: int) -> None:
    """bf16 kernels against the float64 definition on the same rounded numbers, relative to the size of each tensor."""
    arguments = inputs(name, T, J=J, H=H, scale=0.05)
    narrow = [x.bfloat16().cuda() for x in arguments[:-2]] + [x.float().cuda() for x in arguments[-2:]]
    if name == "ssd":
        narrow[0] = narrow[0] * J**-0.5
    reference, _, op = RECURRENCES[name]
    expected = with_gradients(reference, [x.double() for x in narrow])
    for x, y in zip(with_gradients(op, narrow), expected, strict=True):
        assert ((x.double() - y).norm() / y.norm().clamp(min=1e-6)).item() < 0.02
    *tokens, state = narrow
    with torch.no_grad():
        assert flash_linear_attention.answers(*narrow[:3])
        for few in (9, T):  # a few tokens at a time, as in decoding, and all
            found = op(*(x[:, :few] for x in tokens), state)
            expected = reference(*(x[:, :few].double() for x in tokens), state.double())
            for x, y in zip(found, expected, strict=True):
                assert ((x.double() - y).norm() / y.norm()).item() < 0.02


@pytest.mark.gpu
def test_binding_on_a_gpu_is_its_definition() -> None:
    """float32 through Triton's clipped step, values and gradients."""
    arguments = [x.float().cuda() for x in binding(37, 2, H=16, E=32)]
    expected = bound(reference_key_value_binding, [x.double() for x in arguments], clip=0.3)
    for x, y in zip(bound(key_value_binding, arguments, clip=0.3), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=2e-3)
