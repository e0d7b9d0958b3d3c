"""The forward pass for Hopper GPUs: against float64 where there is one, and when it is used at all."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.ops.attention import attention, hopper
from longread.ops.attention.reference import reference_attention, visible
from longread.ops.fusible import without_kernels

ROOT = Path(__file__).parent.parent


def normed(B: int, heads: int, tokens: int, H: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, tokens, heads, H, generator=generator, dtype=torch.float64)
    return (x / x.square().mean(-1, keepdim=True).sqrt()).transpose(1, 2)


CASES = [
    # B, N, G, T, P, H, window
    (1, 2, 2, 1024, 8192, 80, 8192),
    (1, 1, 1, 128, 64, 80, 1000),
    (2, 2, 2, 700, 0, 80, 700),
    (1, 2, 1, 1500, 0, 80, 200),
    (2, 4, 2, 1000, 1500, 96, 1100),
    (1, 3, 3, 2049, 777, 72, 700),
    (1, 2, 2, 300, 2048, 80, None),
    (1, 2, 2, 1, 130, 80, 100),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case: tuple[Any, ...]) -> None:
    B, N, G, T, P, H, window = case
    made = normed(B, N, T, H, 0), *(normed(B, G, n, H, i) for i, n in ((1, T), (2, T), (3, P), (4, P)))
    q, k, v, *past = (x.to("cuda", torch.bfloat16) for x in made)
    gain = torch.ones(H, device="cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    assert hopper.overlaps(q, k, gain)
    kernel, wide = (
        importlib.import_module("longread.ops.attention.triton")._attend,
        [x.double() for x in (q, k, v, *past)],
    )
    limit = min(window or T + P, T + P)
    out, lse = kernel(q, k, v, *past, limit, H**-0.5, gain, gain)
    again, _ = kernel(q, k, v, *past, limit, H**-0.5, gain, gain)
    assert torch.equal(out, again)
    older = (wide[3], wide[4]) if P else None
    exact = reference_attention(*wide[:3], past=older, window=window)
    plain = reference_attention(q, k, v, past=(past[0], past[1]) if P else None, window=window)
    assert (out - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-3 * exact.norm()
    keys = torch.cat((wide[3], wide[1]), 2).repeat_interleave(N // G, 1)
    hidden = ~visible(T, P + T, window, q.device)
    exact_lse = (wide[0] @ keys.mT * H**-0.5).masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    assert (lse[..., :T] - exact_lse).abs().max() < 1e-3


@pytest.mark.gpu
def test_scores_beyond_the_bound_are_right_as_well() -> None:
    """The kernel for all answers then."""
    q, k, v, *past = (
        normed(1, 2, n, 80, i).to("cuda", torch.bfloat16) for i, n in enumerate((300, 300, 300, 200, 200))
    )
    gains = (torch.full((80,), 4.0, device="cuda"),) * 2
    q, k, past[0] = 4 * q, 4 * k, 4 * past[0]
    out = attention(q, k, v, past=(past[0], past[1]), window=256, order=0, gains=gains)
    wide = [x.double() for x in (q, k, v, *past)]
    exact = reference_attention(*wide[:3], past=(wide[3], wide[4]), window=256)
    assert (out - exact).norm() < 0.01 * exact.norm()


@pytest.mark.slow
def test_triton_overlaps_its_products_for_hopper() -> None:
    """Where ptxas cannot follow what is under way, it says that it runs products one after the other."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "from tests import overlapped_compiled; overlapped_compiled.main()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'src'}", "HOME": str(Path.home())},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Compiling entry function" in done.stdout
    assert "serialized" not in done.stdout


@pytest.fixture
def query(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if it lay on a Hopper GPU."""
    monkeypatch.setattr(hopper, "_FOUND", {})
    monkeypatch.setattr(hopper, "_is_hopper", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return SimpleNamespace(
        shape=(1, 4, 8, 80), dtype=torch.bfloat16, device=torch.device("cuda"), is_cuda=True, is_meta=False
    )


def test_it_is_compared_once(query: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(hopper, "_difference", lambda like, group, dtype: asked.append(group) or 0.001)
    for heads in (4, 2, 4, 4):
        assert hopper.overlaps(query, torch.empty(1, heads, 8, 80), torch.ones(80))
    assert asked == [1, 2]


@pytest.mark.parametrize("off", [0.5, math.nan, RuntimeError("no such instruction")], ids=str)
def test_where_it_is_wrong_it_is_not_used(query: Any, off: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def difference(*_: Any) -> float:
        if isinstance(off, Exception):
            raise off
        return off

    monkeypatch.setattr(hopper, "_difference", difference)
    key, gain = torch.empty(1, 4, 8, 80), torch.ones(80)
    with pytest.warns(UserWarning, match=r"(0\.5 off on a GPU|nan off|no such instruction).*; attention goes on"):
        assert not hopper.overlaps(query, key, gain)
    assert not hopper.overlaps(query, key, gain)  # and says no more


def test_nothing_is_compared_while_a_graph_is_captured(query: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(hopper, "_difference", lambda *_: pytest.fail("a capture asks the device for no value"))
    key, gain = torch.empty(1, 4, 8, 80), torch.ones(80)
    assert not hopper.overlaps(query, key, gain)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hopper, "_difference", lambda *_: 0.0)
    assert hopper.overlaps(query, key, gain)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (80, torch.float16)])
def test_other_heads_and_types_are_not_its(query: Any, head_dim: int, dtype: torch.dtype) -> None:
    query.shape, query.dtype = (1, 4, 8, head_dim), dtype
    assert not hopper.overlaps(query, torch.empty(1, 4, 8, head_dim), torch.ones(head_dim))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_a_gpu_it_is_not_asked_for(device: str) -> None:
    """Nor is Triton, which would not find one: the meta device stands for a GPU in a rehearsal alone."""
    q, gain = torch.empty(1, 2, 2049, 80, dtype=torch.bfloat16, device=device), torch.ones(80, device=device)
    assert not hopper.overlaps(q, q, gain)
    assert attention(q, q, q, window=None, order=0, gains=(gain, gain)).shape == q.shape


def test_nothing_is_compared_where_plain_pytorch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{attention.__module__}.overlaps", lambda *_: pytest.fail("a kernel is launched"))
    q, gain = torch.zeros(1, 1, 2049, 80, dtype=torch.bfloat16), torch.ones(80)
    with without_kernels():
        assert attention(q, q, q, window=None, order=0, gains=(gain, gain)).shape == q.shape
