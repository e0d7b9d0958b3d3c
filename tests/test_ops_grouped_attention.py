"""Heads that share keys and values, at every order, against keys and values that are written out for every head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longread.ops.attention import attention, banded
from longread.ops.attention.banded import banded_attention
from longread.ops.attention.reference import reference_attention
from longread.ops.attention.ring import plain_ring_attention, ring_attention

N = 6


def draw(B: int, G: int, T: int, P: int, H: int, heads: int = N) -> list[Tensor]:
    """query, key, value, past key, past value in float64."""
    generator = torch.Generator().manual_seed(T + P)
    shapes = [(heads, T), (G, T), (G, T), (G, P), (G, P)]
    return [torch.randn(B, *shape, H, generator=generator, dtype=torch.float64) for shape in shapes]


def repeated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None,
    soft_cap: float | None = None,
) -> Tensor:
    """Head by head, each with keys and values of its own."""
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    heads, T, S = q.shape[1], q.shape[2], k.shape[2]
    k, v = (torch.stack([x[:, n * x.shape[1] // heads] for n in range(heads)], 1) for x in (k, v))
    s = torch.einsum("bnth,bnsh->bnts", q, k) / math.sqrt(q.shape[-1])
    if soft_cap is not None:
        s = soft_cap * torch.tanh(s / soft_cap)
    seen = torch.ones(T, S, dtype=torch.float64).tril(S - T)
    if window is not None:
        seen = seen.triu(S - T - window + 1)
    p = s.exp() * seen
    return torch.einsum("bnts,bnsh->bnth", p / p.sum(-1, keepdim=True), v)


def derivatives(f: Callable[..., Tensor], tensors: list[Tensor], up_to: int, **options: Any) -> list[Tensor]:
    """Output, gradients, and gradients of a scalar made of these, as far as `up_to` goes."""
    leaves = [x.detach().requires_grad_() for x in tensors if x.numel()]
    q, k, v, *past = leaves
    generator = torch.Generator().manual_seed(1)

    def weighed(x: Tensor) -> Tensor:
        return (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()

    out = f(q, k, v, past=(past[0], past[1]) if past else None, **options)
    results = [out]
    if up_to > 0:
        results += torch.autograd.grad(weighed(out), leaves, create_graph=up_to > 1)
    if up_to > 1:
        results += torch.autograd.grad(sum(weighed(x) for x in results), leaves)
    return [x.detach() for x in results]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, index
        error = (a.double().cpu() - e).norm() / e.norm().clamp(min=1.0)
        assert error < tolerance, f"result {index}: {error:.1e}"


@pytest.mark.parametrize("G", [1, 2, N])
@pytest.mark.parametrize(("T", "P"), [(9, 0), (5, 6), (1, 7), (2, 4), (40, 3), (40, 33)])
@pytest.mark.parametrize("window", [None, 1, 4, 33])
def test_heads_share_keys_and_values(G: int, T: int, P: int, window: int | None) -> None:
    tensors = draw(2, G, T, P, 4)
    expected = derivatives(repeated, tensors, 2, window=window)
    agree(derivatives(reference_attention, tensors, 2, window=window), expected)
    agree(derivatives(attention, tensors, 2, window=window, order=2), expected)
    for order in (0, 1):
        some = derivatives(attention, tensors, order, window=window, order=order)
        agree(some, expected[: len(some)])


@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize(("T", "P", "window"), [(9, 0, None), (5, 6, None), (5, 6, 4), (40, 0, 8), (40, 33, 8)])
def test_views_for_kernels_that_do_not_share(
    G: int, T: int, P: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done on a GPU where there is a mask, or float32; heads lie as a model makes them."""
    met = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        met.append(None if mask is None else mask.ndim)
        return banded._attend_to_views(q, k, v, mask, is_causal)

    monkeypatch.setattr(banded, "attend", attend)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(2, G, T, P, 4)]
    agree(
        derivatives(banded_attention, tensors, 1, window=window),
        derivatives(repeated, tensors, 1, window=window),
    )
    assert met == [{(9, 0): None, (40, 0): 4}.get((T, P), 2)]


@pytest.mark.parametrize("G", [1, 2, N])
@pytest.mark.parametrize(("P", "window"), [(0, None), (3, None), (7, 4)])
def test_scores_with_a_cap(G: int, P: int, window: int | None) -> None:
    tensors = draw(2, G, 5, P, 4)
    tensors[0] *= 5
    expected = derivatives(repeated, tensors, 2, window=window, soft_cap=2.0)
    for order in (0, 1, 2):  # whatever the order, a result can be differentiated twice
        agree(derivatives(attention, tensors, 2, window=window, soft_cap=2.0, order=order), expected)
    past = tensors[3], tensors[4]
    without = attention(*tensors[:3], past=past, window=window, order=2)
    assert (expected[0] - without).norm() > 0.1
    torch.testing.assert_close(attention(*tensors[:3], past=past, window=window, order=2, soft_cap=1e6), without)


@pytest.mark.parametrize("G", [1, 2, N])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("f", [ring_attention, plain_ring_attention])
def test_heads_share_a_ring(f: Callable[..., Tensor], G: int, window: int | None, soft_cap: float | None) -> None:
    """Token by token from an empty ring, around it where the window lets tokens be forgotten."""
    R, steps, H, B = 7, 7 if window is None else 17, 4, 2
    q, k, v, *_ = draw(B, G, steps, 0, H)
    ring = torch.zeros(2, B, G, R, H, dtype=torch.float64)
    whole = repeated(q, k, v, window=window, soft_cap=soft_cap)
    for t in range(steps):
        new = [x[:, :, t : t + 1] for x in (q, k, v)]
        out = f(*new, (ring[0], ring[1]), torch.full((B,), t), window=window, soft_cap=soft_cap)
        torch.testing.assert_close(out, whole[:, :, t : t + 1])
    for held, x in zip(ring, (k, v), strict=True):
        assert torch.equal(held[:, :, (steps - 1) % R], x[:, :, -1])


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that any operation has made or looked at."""

    size = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("order", [0, 1, 2])
def test_keys_and_values_are_never_written_out_for_every_head(order: int) -> None:
    """Few queries over a long past: N copies of its keys would be the largest tensor by far."""
    P, H = 96, 16
    tensors = draw(1, 1, 2, P, H)
    with Largest() as largest:
        derivatives(attention, tensors, order, window=None, order=order)
    assert 8 * (P + 2) * H <= largest.size < 8 * 2 * P * H


def test_a_ring_is_never_written_out_for_every_head() -> None:
    new, ring = torch.ones(1, N, 1, 16), [torch.ones(1, 1, 96, 16) for _ in range(2)]
    with Largest() as largest:
        ring_attention(new, new[:, :1], new[:, :1], (ring[0], ring[1]), torch.tensor([3]), window=None)
    assert largest.size == 4 * 96 * 16


def test_heads_that_cannot_share_are_refused() -> None:
    q, k = torch.ones(1, 4, 2, 2), torch.ones(1, 3, 2, 2)
    for order in (0, 1, 2):
        with pytest.raises(ValueError, match="4 heads cannot share 3 heads of keys and values"):
            attention(q, k, k, window=None, order=order)
    with pytest.raises(ValueError, match="4 heads cannot share 0 heads"):
        attention(q, k[:, :0], k[:, :0], window=None, order=1)
    with pytest.raises(ValueError, match=r"have \[2, 2, 1, 1\] heads"):
        attention(q, k[:, :2], k[:, :2], past=(k[:, :1], k[:, :1]), window=None, order=1)
    ring = torch.ones(1, 4, 5, 2)
    with pytest.raises(ValueError, match=r"have \[2, 2, 4, 4\] heads"):
        ring_attention(q[:, :, :1], k[:, :2, :1], k[:, :2, :1], (ring, ring), torch.tensor([0]), window=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("H", [64, 256])
@pytest.mark.parametrize(("T", "P", "window"), [(200, 0, None), (200, 0, 64), (100, 150, None), (100, 150, 128)])
@pytest.mark.parametrize("order", [1, 2])
def test_shared_heads_on_a_gpu(dtype: torch.dtype, H: int, T: int, P: int, window: int | None, order: int) -> None:
    """Values and gradients by whatever answers there: PyTorch's kernels over views, our own, or the reference."""
    tensors = [x.to(dtype).double() for x in draw(2, 2, T, P, H)]
    on_gpu = [x.to("cuda", dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    agree(
        derivatives(attention, on_gpu, order, window=window, order=order),
        derivatives(repeated, tensors, order, window=window),
        3e-2 if dtype == torch.bfloat16 else 3e-3,
    )
